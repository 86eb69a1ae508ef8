# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside the vision tower: alike patches become one token, and attention names the key tokens."""

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
from ...placeholders import EncodedImage, alone, key_tokens, merge_features, shared
from ...report import Stopwatch
from .attention import padding_mask, watched_config
from .compat import features_of, hidden_of, with_features, with_hidden
from .families import Family, Tower
from .families.base import Arguments, refusal
from .patching import patch

Share = tuple[Tensor, Tensor]
"""Token (N) int64 and alive (N) bool of an image, as in ``EncodedImage``."""
Carry = Callable[[Tensor], list[Tensor]]
"""A number for each of the tower's outputs (tiles, lead + patches) -> (N) per image."""


@dataclasses.dataclass
class Run:
    """One run of the tower over the tiles of some images."""

    modality: str
    tower: Tower | None
    grid: tuple[int, int] = (0, 0)
    lead: int = 0  # features of a tile before those of its patches
    counts: Tensor | None = None  # (tiles) tokens of each tile with CLS; None: not merged
    lengths: Sequence[int] = ()  # counts on the host
    assignment: Tensor | None = None  # (tiles, prefix+n) token that each patch went into
    mask: Tensor | None = None  # where the tiles' lengths differ
    importance: list[Tensor] = dataclasses.field(default_factory=list)  # (tiles, S) float32, without CLS


class VisionStage:
    """Hooks in the tower, and ``get_..._features`` that return as many features as an image has placeholders.

    A merged token's feature stands at all of its patches' placeholders, so that the model can pack its features as
    ever; ``EncodedImage`` says which one is to stay. So a prompt keeps its length until the language model begins.
    """

    def __init__(self, family: Family, config: MustDropConfig, stopwatch: Stopwatch) -> None:
        self.family = family
        self.config = config
        self.stopwatch = stopwatch
        self.encoded: dict[str, list[EncodedImage]] = {}
        """By modality: what was encoded last."""
        self._run: Run | None = None  # the tower works for get_..._features

    def install(self, stack: contextlib.ExitStack) -> None:
        """Adds the hooks; the stack takes them away."""
        body, config = self.family.body, self.config
        towers: dict[int, Tower] = {}
        for modality in self.family.modalities:
            name = f"get_{modality}_features"
            patch(stack, body, name, self._wrap(modality, getattr(body, name)))
            tower = self.family.tower(modality)
            if tower is not None:
                towers[id(tower.attention)] = tower
        for tower in towers.values():
            if config.merges_in_tower and tower.whole is None:
                self._install_merge(stack, tower)
            if config.key_rate > 0:
                patch(stack, tower.attention, "config", watched_config(tower.attention.config, self._look))
        if config.merges_in_tower:
            stack.callback(body.multi_modal_projector.register_forward_hook(self._spread).remove)

    def _install_merge(self, stack: contextlib.ExitStack, tower: Tower) -> None:
        # Before transformers' own hook, which records the hidden states that the features are taken from.
        layer = self.config.merge_layer
        stack.callback(tower.layers[layer].register_forward_hook(self._merge, prepend=True).remove)
        for later in tower.layers[layer + 1 :]:
            stack.callback(later.register_forward_pre_hook(self._mask, with_kwargs=True).remove)

    def _wrap(self, modality: str, get_features: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(get_features)

        @functools.wraps(get_features)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given.update(given.pop("kwargs", {}))
            arguments = {name: value for name, value in given.items() if value is not None}
            if not self.encoded:
                self.stopwatch.read()  # begins anew, whatever became of the last prompt
            self._run = run = self._begin(modality, arguments)
            try:
                output = get_features(*args, **kwargs)
            finally:
                self._run = None
            pieces = features_of(output)
            features, images = self._encode(run, torch.cat(pieces), [len(piece) for piece in pieces], arguments)
            self.encoded[modality] = images
            if self.config.merge and not self.config.merges_in_tower:
                output = with_features(output, features)
            if hasattr(output, "pooler_output"):
                output.mustdrop = images  # generate() may hand this object on, later and repeated
            return output

        return wrapped

    def _begin(self, modality: str, arguments: Arguments) -> Run:
        run = Run(modality, self.family.tower(modality))
        if self.config.merges_in_tower and (reason := self.family.why_whole(modality, arguments)):
            raise ValueError(refusal(reason))
        if run.tower is not None:
            run.grid = self.family.grid(modality, arguments)
            run.lead = self.family.lead(modality, arguments)
        return run

    # While the tower runs

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
            else:  # waits for the device: the length of the next layers
                run.lengths = merged.counts.tolist()
                tokens = tokens[:, : max(run.lengths)]
            if min(run.lengths) < tokens.shape[1]:
                real = torch.arange(tokens.shape[1], device=tokens.device) < merged.counts[:, None]
                run.mask = padding_mask(run.tower.config, real, tokens.dtype)
        return with_hidden(output, tokens)

    def _mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._run is None or self._run.mask is None:
            return None
        hidden, _, *rest = args  # the encoder passes hidden_states and attention_mask by position
        return (hidden, self._run.mask, *rest), kwargs

    def _look(self, query: Tensor, key: Tensor, scale: float) -> None:  # (tiles, H, S, D) each
        run = self._run
        if run is None or run.tower is None:
            return
        with self.stopwatch.measure("key tokens"):
            prefix = run.tower.prefix
            if prefix:
                found = stages.cls_attention(query[:, :, 0], key, scale, self.config, counts=run.counts)
            else:
                found = stages.received_attention(query, key, scale, self.config, counts=run.counts)
            if query.shape[1] < run.tower.heads:  # most plans leave the tower whole
                found = mean_over_ranks(found, self.family.ranks)
            run.importance.append(found[:, prefix:])

    def _spread(self, module: nn.Module, args: Any, features: Tensor) -> Tensor | None:
        """Features (tiles, S, C) of the tokens -> (tiles, lead + n, C) of the patches that they stand for."""
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

    def _token_of_patch(self, run: Run) -> Tensor:  # (tiles, n) int64, without CLS
        """Whose feature each patch's placeholder gets.

        Published positions number the tokens, so placeholders 0, 1, 2, ... take them.
        """
        assert run.tower is not None
        assert run.assignment is not None
        assignment = run.assignment[:, run.tower.prefix :] - run.tower.prefix
        if self.config.positions == "original":
            return assignment
        place = torch.arange(assignment.shape[1], device=assignment.device)
        return place.clamp(max=max(run.lengths) - run.tower.prefix - 1).expand_as(assignment)

    # Behind the tower

    def _encode(
        self,
        run: Run,
        features: Tensor,  # (sum of N, C), of all images
        pieces: Sequence[int],  # as the model has them
        arguments: Arguments,
    ) -> tuple[Tensor, list[EncodedImage]]:
        """What became of each image, and the features that it has at its placeholders."""
        family, config = self.family, self.config
        carry = functools.partial(family.pack, run.modality, arguments=arguments, gap=0.0)
        lengths = list(pieces)
        if run.tower is not None:
            shape = (family.tiles(run.modality, arguments), run.lead + run.grid[0] * run.grid[1])
            lengths = [len(image) for image in carry(torch.zeros(shape))]
            views = family.views(run.modality, lengths, arguments)
        else:
            views = [(torch.arange(length)[None],) for length in lengths]  # in a row
        if config.merge and not config.merges_in_tower:
            with self.stopwatch.measure("merge"):
                features, shares = self._merge_features(features, lengths, pieces, views)
        else:
            shares = self.shares(run, lengths, carry, features.device)
        keys = [torch.zeros_like(alive) for _, alive in shares]
        if run.importance:
            with self.stopwatch.measure("key tokens"):
                keys = key_tokens(carry(self._importance(run, shape)), shares, views, config)
        rows = zip(views, shares, keys, strict=True)
        return features, [EncodedImage(run.modality, grids, *share, key) for grids, share, key in rows]

    def shares(self, run: Run, lengths: Sequence[int], carry: Carry, device: torch.device) -> list[Share]:
        """Whose token each placeholder of each image shares, and which hold one, when the tower is done.

        A subclass with another first stage overrides it. Features stand at the placeholders already: the projector's
        output can be brought to them by a hook, since a model takes no other number of them.
        """
        if run.assignment is None:
            return [alone(length, device) for length in lengths]
        highest = len(run.assignment) * max(run.lengths)
        return self._published(run) or [shared(image, highest) for image in carry(self._numbers(run))]

    def _merge_features(
        self, features: Tensor, lengths: Sequence[int], pieces: Sequence[int], views: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[Share]]:
        """Merged features, and token and alive of each image."""
        # Earlier versions of transformers put a newline token behind OneVision's videos later.
        own = lengths if sum(lengths) == len(features) else pieces
        merged, shares = [], []
        for image, length, grids in zip(features.split(list(own)), lengths, views, strict=True):
            image, token = merge_features(image, grids, self.config)
            place, _ = alone(length, features.device)
            token = torch.cat([token, place[len(token) :]])
            merged.append(image)
            shares.append((token, token == place))
        return torch.cat(merged), shares

    def _numbers(self, run: Run) -> Tensor:  # (tiles, lead + n) float64
        """A number for each token of the batch, at its patches; 0: no patch."""
        token = self._token_of_patch(run)
        tile = torch.arange(len(token), device=token.device)[:, None] * max(run.lengths)
        return nn.functional.pad((token + tile + 1).double(), (run.lead, 0))

    def _published(self, run: Run) -> list[Share] | None:
        """Token and alive of each image where placeholders 0, 1, 2, ... take the tokens."""
        if self.config.positions == "original":
            return None
        assert run.tower is not None
        assert run.assignment is not None
        assignment = run.assignment[:, run.tower.prefix :] - run.tower.prefix
        place = torch.arange(assignment.shape[1], device=assignment.device)
        return [
            (token, place < length - run.tower.prefix) for token, length in zip(assignment, run.lengths, strict=True)
        ]

    def _importance(self, run: Run, shape: tuple[int, int]) -> Tensor:  # (tiles, lead + n) float32
        """At each patch that of its token; 0 before the patches."""
        found = torch.cat([part.flatten() for part in run.importance]).view(shape[0], -1)
        if run.assignment is not None:
            found = found.gather(1, self._token_of_patch(run))
        return nn.functional.pad(found, (shape[1] - found.shape[1], 0))
