# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside the vision tower: similar patches merge into one token, and attention selects the key tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import stages
from ...config import MustDropConfig
from ...parallel import mean_over_ranks
from ...placeholders import (
    EncodedImage,
    Share,
    merge_features,
    own_tokens,
    select_key_tokens,
    shared_tokens,
    token_importance,
)
from ...report import Stopwatch
from .attention import hooked_config, padding_mask
from .compat import features_of, hidden_of, with_features, with_hidden
from .families import Family, Tower
from .families.base import Arguments, refusal
from .patching import patch

Packing = Callable[[Tensor], list[Tensor]]
"""A number for each of the tower's outputs (tiles, lead + patches) -> (N) per image, as the model packs features."""


@dataclasses.dataclass
class TowerRun:
    """One run of the tower over the tiles of some images."""

    modality: str
    tower: Tower | None
    grid: tuple[int, int] = (0, 0)
    lead: int = 0  # features of a tile before its patches
    counts: Tensor | None = None  # (tiles) tokens of each tile with CLS; None: not merged
    lengths: Sequence[int] = ()  # counts on the host
    assignment: Tensor | None = None  # (tiles, prefix+n) token of each patch
    mask: Tensor | None = None  # if the lengths of the tiles differ
    importance: list[Tensor] = dataclasses.field(default_factory=list)  # (tiles, S) float32, without CLS


class VisionStage:
    """Hooks in the tower, and patched ``get_..._features`` that return one feature per placeholder.

    The feature of a merged token is repeated at the placeholders of all its patches, so that the model's own packing
    still works; ``EncodedImage`` holds which placeholder keeps the token. A prompt has its plain length until the
    language model begins.
    """

    def __init__(self, family: Family, config: MustDropConfig, stopwatch: Stopwatch) -> None:
        self.family = family
        self.config = config
        self.stopwatch = stopwatch
        self._run: TowerRun | None = None  # while a get_..._features runs

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks of a run of the tower; the stack removes them."""
        body, config = self.family.body, self.config
        towers: dict[int, Tower] = {}
        for modality in self.family.modalities:
            tower = self.family.tower(modality)
            if tower is not None:
                towers[id(tower.attention)] = tower
        for tower in towers.values():
            if config.merges_in_tower and tower.whole is None:
                self._install_merge(stack, tower)
            if config.key_rate > 0:
                patch(stack, tower.attention, "config", hooked_config(tower.attention.config, self._record_importance))
        if config.merges_in_tower:
            stack.callback(body.multi_modal_projector.register_forward_hook(self._repeat_features).remove)

    def _install_merge(self, stack: contextlib.ExitStack, tower: Tower) -> None:
        # Runs before transformers' own hook, which records the hidden states that become the features.
        layer = self.config.merge_layer
        stack.callback(tower.layers[layer].register_forward_hook(self._merge, prepend=True).remove)
        for later in tower.layers[layer + 1 :]:
            stack.callback(later.register_forward_pre_hook(self._add_mask, with_kwargs=True).remove)

    def features_getter(
        self, modality: str, plain: Callable[..., Any]
    ) -> Callable[..., tuple[Any, list[EncodedImage]]]:
        """A function that runs ``get_..._features`` with the hooks on, and also returns the images."""
        signature = inspect.signature(plain)

        def get(*args: Any, **kwargs: Any) -> tuple[Any, list[EncodedImage]]:
            given = signature.bind(*args, **kwargs).arguments
            given.update(given.pop("kwargs", {}))
            arguments = {name: value for name, value in given.items() if value is not None}
            self._run = run = self._begin_run(modality, arguments)
            try:
                with contextlib.ExitStack() as hooks:
                    self.install(hooks)
                    output = plain(*args, **kwargs)
            finally:
                self._run = None
            pieces = features_of(output)
            features, images = self._encode(run, torch.cat(pieces), [len(piece) for piece in pieces], arguments)
            if self.config.merge and not self.config.merges_in_tower:
                output = with_features(output, features)
            if hasattr(output, "pooler_output"):
                output.mustdrop = images  # generate() may pass this object on later, repeated
            return output, images

        return get

    def _begin_run(self, modality: str, arguments: Arguments) -> TowerRun:
        run = TowerRun(modality, self.family.tower(modality))
        if self.config.merges_in_tower and (reason := self.family.why_whole(modality, arguments)):
            raise ValueError(refusal(reason))
        if run.tower is not None:
            run.grid = self.family.grid(modality, arguments)
            run.lead = self.family.lead(modality, arguments)
        return run

    # Hooks of the tower

    def _merge(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._run
        if run is None or run.tower is None:
            return None
        with self.stopwatch.measure("merge"):
            merged = stages.merge_vision_tokens(
                hidden_of(output).contiguous(), run.grid, self.config, num_prefix_tokens=run.tower.prefix
            )
            tokens, run.counts, run.assignment = merged.tokens, merged.counts, merged.assignment
            if self.config.merge_budget is not None:
                run.lengths = [tokens.shape[1]] * tokens.shape[0]
            else:  # synchronizes with the device, to read the length of the next layers
                run.lengths = merged.counts.tolist()
                tokens = tokens[:, : max(run.lengths)]
            if min(run.lengths) < tokens.shape[1]:
                real = torch.arange(tokens.shape[1], device=tokens.device) < merged.counts[:, None]
                run.mask = padding_mask(run.tower.config, real, tokens.dtype)
        return with_hidden(output, tokens)

    def _add_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._run is None or self._run.mask is None:
            return None
        hidden, _, *rest = args  # the encoder passes hidden_states and attention_mask by position
        return (hidden, self._run.mask, *rest), kwargs

    def _record_importance(self, query: Tensor, key: Tensor, scale: float) -> None:  # (tiles, H, S, D) each
        run = self._run
        if run is None or run.tower is None:
            return
        with self.stopwatch.measure("key tokens"):
            prefix = run.tower.prefix
            if prefix:
                found = stages.cls_attention(query[:, :, 0], key, scale, self.config, counts=run.counts)
            else:
                found = stages.received_attention(query, key, scale, self.config, counts=run.counts)
            if query.shape[1] < run.tower.heads:  # few tensor parallel plans split the tower
                found = mean_over_ranks(found, self.family.ranks)
            run.importance.append(found[:, prefix:])

    def _repeat_features(self, module: nn.Module, args: Any, features: Tensor) -> Tensor | None:
        """Features of tokens (tiles, S, C) -> features of patches (tiles, lead + n, C)."""
        run = self._run
        if run is None or run.tower is None or run.assignment is None:
            return None
        lead = features.shape[1] - (max(run.lengths) - run.tower.prefix)
        if lead not in (0, run.tower.prefix):
            raise ValueError(
                f"{max(run.lengths) - run.tower.prefix} tokens are left of a tile but it has {features.shape[1]} "
                "features: vision_feature_layer must come after merge_layer"
            )
        index = torch.cat([torch.arange(lead, device=features.device).expand(len(features), lead),
                           lead + self._token_of_patch(run)], 1)  # fmt: skip
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))

    def _token_of_patch(self, run: TowerRun) -> Tensor:  # (tiles, n) int64, without CLS
        """Token whose feature each patch's placeholder takes.

        Published positions number the tokens, so placeholders 0, 1, 2, ... take them in order.
        """
        assert run.tower is not None
        assert run.assignment is not None
        assignment = run.assignment[:, run.tower.prefix :] - run.tower.prefix
        if self.config.positions == "original":
            return assignment
        place = torch.arange(assignment.shape[1], device=assignment.device)
        return place.clamp(max=max(run.lengths) - run.tower.prefix - 1).expand_as(assignment)

    # After the tower

    def _encode(
        self,
        run: TowerRun,
        features: Tensor,  # (sum of N, C) of all images
        pieces: Sequence[int],  # lengths of the model's own output
        arguments: Arguments,
    ) -> tuple[Tensor, list[EncodedImage]]:
        """The features at the placeholders, and the result of stage 1 for each image."""
        family, config = self.family, self.config
        pack = functools.partial(family.pack, run.modality, arguments=arguments, gap=0.0)
        lengths = list(pieces)
        if run.tower is not None:
            shape = (family.tiles(run.modality, arguments), run.lead + run.grid[0] * run.grid[1])
            lengths = [len(image) for image in pack(torch.zeros(shape, device="cpu"))]
            views = family.views(run.modality, lengths, arguments)
        else:
            views = [(torch.arange(length, device="cpu")[None],) for length in lengths]  # one row
        if config.merge and not config.merges_in_tower:
            with self.stopwatch.measure("merge"):
                features, shares = self._merge_features(features, lengths, pieces, views)
        else:
            shares = self.shares(run, lengths, pack, features.device)
        images = [
            EncodedImage(run.modality, grids, token, alive, torch.zeros_like(alive))
            for grids, (token, alive) in zip(views, shares, strict=True)
        ]
        if run.importance:
            with self.stopwatch.measure("key tokens"):
                importance = pack(self._importance(run, shape))
                images = [
                    dataclasses.replace(image, importance=token_importance(values, image.token, config))
                    for image, values in zip(images, importance, strict=True)
                ]
                flags = select_key_tokens(images, config)
                images = [
                    dataclasses.replace(image, is_key_token=keys) for image, keys in zip(images, flags, strict=True)
                ]
        return features, images

    def shares(self, run: TowerRun, lengths: Sequence[int], pack: Packing, device: torch.device) -> list[Share]:
        """The token of each placeholder of each image, and which hold one, after the tower.

        A subclass with another first stage overrides it. Its hook on the projector must have brought the features to
        the placeholders, since a model accepts no other number of features.
        """
        if run.assignment is None:
            return [own_tokens(length, device) for length in lengths]
        highest = len(run.assignment) * max(run.lengths)
        return self._published(run) or [shared_tokens(image, highest) for image in pack(self._numbers(run))]

    def _merge_features(
        self, features: Tensor, lengths: Sequence[int], pieces: Sequence[int], views: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[Share]]:
        """Merged features, and the tokens that the placeholders of each image share."""
        # Earlier versions of transformers put a newline token behind OneVision's videos later.
        own = lengths if sum(lengths) == len(features) else pieces
        merged, shares = [], []
        for image, length, grids in zip(features.split(list(own)), lengths, views, strict=True):
            image, token = merge_features(image, grids, self.config)
            place, _ = own_tokens(length, features.device)
            token = torch.cat([token, place[len(token) :]])
            merged.append(image)
            shares.append((token, token == place))
        return torch.cat(merged), shares

    def _numbers(self, run: TowerRun) -> Tensor:  # (tiles, lead + n) float64
        """Number of each patch's token in the batch, from 1; 0 before the patches."""
        token = self._token_of_patch(run)
        tile = torch.arange(len(token), device=token.device)[:, None] * max(run.lengths)
        return nn.functional.pad((token + tile + 1).double(), (run.lead, 0))

    def _published(self, run: TowerRun) -> list[Share] | None:
        """Shares of each image with published positions, where placeholders 0, 1, 2, ... take the tokens."""
        if self.config.positions == "original":
            return None
        assert run.tower is not None
        assert run.assignment is not None
        assignment = run.assignment[:, run.tower.prefix :] - run.tower.prefix
        place = torch.arange(assignment.shape[1], device=assignment.device)
        return [
            (token, place < length - run.tower.prefix) for token, length in zip(assignment, run.lengths, strict=True)
        ]

    def _importance(self, run: TowerRun, shape: tuple[int, int]) -> Tensor:  # (tiles, lead + n) float32
        """Importance of each patch's token; 0 before the patches."""
        found = torch.cat([part.flatten() for part in run.importance]).view(shape[0], -1)
        if run.assignment is not None:
            found = found.gather(1, self._token_of_patch(run))
        return nn.functional.pad(found, (shape[1] - found.shape[1], 0))
