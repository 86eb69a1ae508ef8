# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside the vision tower: alike patches become one token, and the CLS token names the key tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ... import stages
from ...config import MustDropConfig
from ...report import Stopwatch
from .attention import padding_mask
from .llava import Llava, hidden_of, with_hidden


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What stage 1 made of an image. Its tokens go by the placeholder, 0 .. N-1, that they take in the prompt."""

    grid: tuple[int, int]
    token_of_patch: Tensor  # (N) int64
    alive: Tensor  # (N) bool, placeholders that hold a token
    key: Tensor  # (N) bool
    tokens: int
    keys: int


@dataclasses.dataclass
class _Pass:
    """One run of the vision tower over a batch of images."""

    grid: tuple[int, int]
    counts: Tensor | None = None  # (B) tokens with CLS, where they were merged
    lengths: Sequence[int] = ()  # counts on the host
    source: Tensor | None = None  # (B, 1+N) token that each patch went into
    mask: Tensor | None = None  # where the images' lengths differ
    query: Tensor | None = None  # (B, S, C) of the last layer
    key: Tensor | None = None  # (B, S, C) of the last layer


class VisionStage:
    """Hooks in the tower, and a ``get_image_features`` that returns the features at their places in the prompt."""

    def __init__(self, llava: Llava, config: MustDropConfig, stopwatch: Stopwatch) -> None:
        self.llava = llava
        self.config = config
        self.stopwatch = stopwatch
        self.encoded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """By feature tensor: transformers repeats and reorders these (beams, several answers) as it likes."""
        self._pass: _Pass | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks; the stack takes them away."""
        layers, config = self.llava.vision_layers, self.config
        if config.merge:
            # Before transformers' own hook, which records the hidden states that the features are taken from.
            merge = layers[config.merge_layer].register_forward_hook(self._merge, prepend=True)
            stack.callback(merge.remove)
            for layer in layers[config.merge_layer + 1 :]:
                stack.callback(layer.register_forward_pre_hook(self._mask, with_kwargs=True).remove)
        if config.key_rate > 0:
            attention = layers[-1].self_attn
            stack.callback(attention.q_proj.register_forward_hook(self._take_query).remove)
            stack.callback(attention.k_proj.register_forward_hook(self._take_key).remove)

    # Hooks. Outside of `get_image_features` they do nothing.

    def _merge(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._pass is None:
            return None
        with self.stopwatch.measure("merge"):
            merged = stages.merge_vision_tokens(hidden_of(output), self._pass.grid, self.config)
            tokens = merged.tokens
            self._pass.counts, self._pass.source = merged.counts, merged.source
            if self.config.merge_budget is not None:
                self._pass.lengths = [tokens.shape[1]] * tokens.shape[0]
            else:
                self._pass.lengths = merged.counts.tolist()  # waits for the device: the next layers' length
                tokens = tokens[:, : max(self._pass.lengths)]
            if min(self._pass.lengths) < tokens.shape[1]:
                real = torch.arange(tokens.shape[1], device=tokens.device) < merged.counts[:, None]
                self._pass.mask = padding_mask(self.llava.body.vision_tower.config, real, tokens.dtype)
        return with_hidden(output, tokens)

    def _mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The encoder passes (hidden_states, attention_mask, ...) by position."""
        if self._pass is None or self._pass.mask is None:
            return None
        return (args[0], self._pass.mask, *args[2:]), kwargs

    def _take_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._pass is not None:
            self._pass.query = output

    def _take_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._pass is not None:
            self._pass.key = output

    # get_image_features

    def wrap(self, get_image_features: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``get_image_features``, whose features then fill all N placeholders of each image.

        A merged token's feature stands at one of its patches' placeholders (see ``_placeholders``) and the others are
        zero; they never reach the language model. So prompts keep their length until the language model begins.
        """

        @functools.wraps(get_image_features)
        def wrapped(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._pass = _Pass(self._grid(pixel_values))
            try:
                output = get_image_features(pixel_values, *args, **kwargs)
                features = getattr(output, "pooler_output", output)  # transformers 4 returns the list itself
                features, images = self._place(list(features))
            finally:
                self._pass = None
            for feature, image in zip(features, images):
                self.encoded[feature] = image
            if hasattr(output, "pooler_output"):
                output.pooler_output = features
                return output
            return features

        return wrapped

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = pixel_values.shape[-2:]
        patch = self.llava.patch_size or 1
        return height // patch, width // patch

    def _place(self, features: list[Tensor]) -> tuple[list[Tensor], list[EncodedImage]]:
        """Features (S, C) per image -> features (N, C) at their placeholders, and what was done."""
        assert self._pass is not None
        device = features[0].device
        key = self._key_tokens()
        length = max(self._pass.lengths) - 1 if self._pass.lengths else None
        if length is not None and features[0].shape[0] != length:
            raise ValueError(
                f"the tower's tokens were merged to {length} but the features have {features[0].shape[0]}: "
                "vision_feature_layer must come after merge_layer, vision_feature_select_strategy must be 'default'"
            )
        if self._pass.source is None:  # not merged: each patch is a token at its own placeholder
            images = []
            for i, feature in enumerate(features):
                patches = feature.shape[0]
                place = torch.arange(patches, device=device)
                marked = torch.zeros_like(place, dtype=torch.bool) if key is None else key[i]
                grid = self._pass.grid if math.prod(self._pass.grid) == patches else (1, patches)
                images.append(
                    EncodedImage(grid, place, place >= 0, marked, patches, self._number_of_keys(patches))
                )
            return features, images

        stacked = torch.stack(features)  # (B, S, C), CLS left out
        source = self._pass.source[:, 1:] - 1  # (B, N)
        batch, patches = source.shape
        slot = self._placeholders(source, stacked.shape[1])  # (B, S), N in the padding
        placed = stacked.new_zeros(batch, patches + 1, stacked.shape[2])
        placed = placed.scatter(1, slot[..., None].expand_as(stacked), stacked)[:, :patches]
        alive = torch.zeros(batch, patches + 1, dtype=torch.bool, device=device)
        marked = torch.zeros_like(alive)
        alive = alive.scatter(1, slot, True)[:, :patches]
        if key is not None:
            marked = marked.scatter(1, slot, key)
        token_of_patch = slot.gather(1, source)
        images = []
        for i, length in enumerate(self._pass.lengths):
            tokens = length - 1
            images.append(
                EncodedImage(
                    self._pass.grid,
                    token_of_patch[i],
                    alive[i],
                    marked[i, :patches],
                    tokens,
                    self._number_of_keys(tokens),
                )
            )
        return list(placed), images

    def _placeholders(self, source: Tensor, length: int) -> Tensor:
        """(B, N) token of each patch -> (B, length) placeholder of each token, N in the padding.

        With original positions a token stands where its first patch stood. Published positions number the tokens, so
        token i takes placeholder i.
        """
        batch, patches = source.shape
        place = torch.arange(patches, device=source.device).expand(batch, -1)
        first = torch.full((batch, length), patches, device=source.device)
        first = first.scatter_reduce(1, source, place, "amin")
        if self.config.positions == "published":
            return torch.where(first < patches, torch.arange(length, device=source.device), patches)
        return first

    def _number_of_keys(self, tokens: int) -> int:
        return math.ceil(self.config.key_rate * tokens)

    def _key_tokens(self) -> Tensor | None:  # (B, S) bool, CLS left out
        if self.config.key_rate == 0:
            return None
        assert self._pass is not None and self._pass.query is not None and self._pass.key is not None
        attention = self.llava.vision_layers[-1].self_attn
        heads = (-1, attention.head_dim)
        with self.stopwatch.measure("key tokens"):
            query = self._pass.query[:, 0].unflatten(-1, heads)  # (B, H, D)
            key = self._pass.key.unflatten(-1, heads).transpose(1, 2)  # (B, H, S, D)
            kept = stages.key_tokens(query, key, attention.scale, self.config, counts=self._pass.counts)
        return kept[:, 1:]
