# SPDX-License-Identifier: Apache-2.0
"""Records of merged, kept and dropped tokens per stage, layer and image; cache sizes; times. All on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..placeholders import first_placeholders


@dataclasses.dataclass(frozen=True)
class ViewReport:
    """A grid of vision tokens: a picture, or a video. Maps have its shape, (H, W), or (T, H, W) for T frames.

    A token is named by the patch whose position it takes, counted row by row, frame after frame. A patch has one
    placeholder in the prompt; in some models that is several patches of the vision tower.
    """

    token_of_patch: Tensor
    """int64: the token of each patch."""
    key: Tensor
    """bool: patches whose token is a key token."""
    survived: dict[int, Tensor]
    """Pruning layer -> bool: patches whose token remains after it."""
    heat: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """Layer -> float32: attention to each token, mean over text queries and heads; nan for dropped tokens. Empty
    without ``drop_tokens(..., heat_maps=True)``."""

    @property
    def grid(self) -> tuple[int, ...]:
        """H, W, or T, H, W."""
        return tuple(self.token_of_patch.shape)

    @property
    def patches(self) -> int:
        """Their number."""
        return self.token_of_patch.numel()

    @property
    def merged(self) -> Tensor:
        """bool: patches that share their token with others."""
        sizes = torch.bincount(self.token_of_patch.flatten(), minlength=self.patches)
        return sizes[self.token_of_patch] > 1

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Merged windows in raster order, in patches: (row, column, H, W), or (frame, row, column, T, H, W)."""
        windows = []
        for token in self.token_of_patch[self.merged].unique().tolist():
            places = torch.nonzero(self.token_of_patch == token)
            first, last = places.amin(0), places.amax(0)
            windows.append((*first.tolist(), *(last - first + 1).tolist()))
        return sorted(windows)

    def frame(self, number: int) -> ViewReport:
        """One frame of a video; tokens are named by their first patch in it."""
        token = self.token_of_patch[number]
        _, inverse = token.unique(return_inverse=True)
        first = first_placeholders(inverse.flatten(), token.numel())
        survived = {layer: alive[number] for layer, alive in self.survived.items()}
        heat = {layer: values[number] for layer, values in self.heat.items()}
        return ViewReport(first[inverse], self.key[number], survived, heat)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        heat = {str(layer): torch.where(v.isnan(), -1.0, v).tolist() for layer, v in self.heat.items()}
        return {
            "grid": list(self.grid),
            "windows": [list(window) for window in self.windows],
            "token_of_patch": self.token_of_patch.tolist(),
            "key": self.key.int().tolist(),
            "survived": {str(layer): alive.int().tolist() for layer, alive in self.survived.items()},
            **({"heat": heat} if heat else {}),  # -1 for dropped tokens
        }


@dataclasses.dataclass(frozen=True)
class ImageReport:
    """One image or video of a prompt, with N placeholders, which are numbered from 0.

    Most images have one view. LLaVA-NeXT's have two, an overview and the picture itself; the properties of a
    view (``grid``, ``token_of_patch``, ``key``, ``survived``, ...) are those of the last, the finest.
    """

    sequence: int
    """The row of the batch."""
    modality: str
    """"image" or "video"."""
    views: tuple[Tensor, ...]
    """Grids of placeholders, (H, W) or (T, H, W) int64."""
    token: Tensor
    """(N) int64: the placeholder whose token stands for each."""
    keys: Tensor
    """(N) bool: placeholders whose token is a key token."""
    alive: dict[int, Tensor]
    """Pruning layer -> (N) bool: placeholders whose token goes on after it."""
    kept: dict[int, int]
    """Pruning layer -> vision tokens that go on after it. A last token of the prompt that is the text query itself is
    not counted."""
    tokens: int
    """Tokens after merging, without those that attention_mask hides."""
    key_tokens: int
    hidden: int = 0
    """Placeholders that attention_mask hides; N: the image is as if it were not there."""
    heat: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """Layer -> (N) float32, as in ``ViewReport``."""

    @property
    def patches(self) -> int:
        """N: placeholders of plain generation, newline tokens included."""
        return self.token.numel()

    def view(self, number: int = -1) -> ViewReport:
        """A view, by default the finest."""
        places = self.views[number]
        order = torch.zeros_like(self.token)
        order[places.flatten()] = torch.arange(places.numel(), device="cpu")
        survived = {layer: alive[places] for layer, alive in self.alive.items()}
        heat = {layer: values[places] for layer, values in self.heat.items()}
        return ViewReport(order[self.token[places]], self.keys[places], survived, heat)

    @property
    def grid(self) -> tuple[int, ...]:
        """H, W, or T, H, W."""
        return self.view().grid

    @property
    def token_of_patch(self) -> Tensor:
        """int64: the token of each patch."""
        return self.view().token_of_patch

    @property
    def key(self) -> Tensor:
        """bool: patches whose token is a key token."""
        return self.view().key

    @property
    def survived(self) -> dict[int, Tensor]:
        """Pruning layer -> bool: patches whose token remains after it."""
        return self.view().survived

    @property
    def merged(self) -> Tensor:
        """bool: patches that share their token with others."""
        return self.view().merged

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Merged windows in raster order: (row, column, height, width) in patches; in a video frames come first."""
        return self.view().windows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "sequence": self.sequence,
            "modality": self.modality,
            "patches": self.patches,
            "tokens": self.tokens,
            "key_tokens": self.key_tokens,
            "hidden": self.hidden,
            "kept": {str(layer): kept for layer, kept in self.kept.items()},
            **self.view().to_dict(),
            "other_views": [self.view(number).to_dict() for number in range(len(self.views) - 1)],
        }


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The KV cache at one moment."""

    lengths: list[int]
    """Tokens of each sequence that each layer holds, padding included."""
    bytes: int
    """Bytes of the whole batch; 0 where no cache was used."""


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """One prompt: a batch of sequences with images."""

    length: int
    """Tokens of the plain prompt, padding included."""
    text: list[int]
    """Text tokens of each sequence."""
    images: list[ImageReport]
    layer_tokens: list[int]
    """Vision tokens that each language layer processed, over the whole batch."""
    plain_cache: CacheReport
    """The cache of plain generation."""
    prefill_cache: CacheReport
    """The cache before stage 3."""
    final_cache: CacheReport
    """The cache at the start of decoding."""
    milliseconds: dict[str, float]
    """Time that the stages themselves took, by name: "merge", "key tokens", "layer 2", ..., "evict"."""
    rows: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long, device="cpu"))
    """(B, length) int64: the row of each position of the plain prompt in the output of ``model(**inputs)``, whose
    logits have a row for each remaining token; -1 for positions without one."""

    @property
    def caches(self) -> tuple[CacheReport, CacheReport, CacheReport]:
        """Plain, before stage 3, after it."""
        return self.plain_cache, self.prefill_cache, self.final_cache

    @property
    def mean_tokens(self) -> float:
        """Vision tokens of an image, averaged over the language layers: the budget by which methods are compared."""
        shown = sum(image.hidden < image.patches for image in self.images)
        return sum(self.layer_tokens) / (len(self.layer_tokens) * max(shown, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = dataclasses.asdict(dataclasses.replace(self, images=[]))
        fields["rows"] = self.rows.tolist()
        return {**fields, "mean_tokens": self.mean_tokens, "images": [image.to_dict() for image in self.images]}
