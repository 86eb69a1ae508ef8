# SPDX-License-Identifier: Apache-2.0
"""Batches that are padded to one length, with a dense cache per layer: Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, stages
from ..config import MustDropConfig
from ..parallel import scores_over_ranks
from ..stages import Pruned, Tokens
from .plan import DropPlan


class PaddedDropPlan(DropPlan["Pruned | None"]):
    """B prompts as (B, L), padded on the left once tokens have gone. ``None`` for the rows that go on: all do."""

    def __init__(
        self,
        tokens: Tokens,
        config: MustDropConfig,
        *,
        voters: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(tokens, config, voters=voters, group=group)
        self.prompt_tokens = tokens
        """The prompts as they came."""
        self.past_types: Tensor | None = None
        """(B, P) uint8: types of P cached tokens that stand before these in the layer that runs. None of them goes."""

    @property
    def nothing_dropped(self) -> bool:
        """Nothing has gone yet, so the model can be left to itself."""
        return self.tokens is self.prompt_tokens

    def drop_empty(self, empty: Tensor, lengths: tuple[int, ...]) -> Pruned | None:
        """Takes placeholders away that stage 1 has emptied.

        Args:
            empty: (B, L) bool.
            lengths: tokens of each prompt that are left.
        """
        return self._go_on(stages.drop_empty(self.tokens, empty, lengths, backend=self.config.backend))

    @property
    def key_types(self) -> Tensor:  # (B, P + L) uint8
        """What the keys of the layer that runs are."""
        return self.tokens.types if self.past_types is None else torch.cat([self.past_types, self.tokens.types], dim=1)

    def _decide(  # (B, Hq, L, D), (B, Hk, P + L, D), (B, Hq, L)
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> Pruned:
        if self.past_types is not None:
            rows, backend = (query, key, self.key_types, scale), self.config.backend
            if self._group is None:
                scores = ops.text_vision_scores(*rows, lse=lse, backend=backend)
            else:
                scores = scores_over_ranks(*rows, self._most_voters, self._group, lse=lse, backend=backend)
            own = slice(self.past_types.shape[1], None)
            total, peak = (score[:, own] for score in scores)
            return stages.select(ops.Scores(total, peak), self.tokens, self.config, self._stage)
        if self._group is not None:
            return self._decide_over_ranks(query, key, scale, lse)
        return stages.prune(query, key, self.tokens, scale, self.config, self._stage, lse=lse)

    def _go_on(self, pruned: Pruned) -> Pruned | None:
        if pruned.lengths == self.tokens.lengths:
            return None
        renumber = self.config.positions == "published"
        self.tokens = self.tokens.take(pruned, renumber=renumber, backend=self.config.backend)
        return pruned

    def take(self, x: Tensor, chosen: Pruned | None) -> Tensor:  # (B, L, ...) -> (B, left, ...)
        """The rows of hidden states that go on."""
        if chosen is None:
            return x
        return ops.gather_tokens(x, chosen.keep, chosen.counts, align_end=True, backend=self.config.backend)

    @property
    def layers_to_compact(self) -> list[int]:
        """The layers whose caches stage 3 cuts."""
        first = self.config.first_evicted_layer
        if first is None:
            return []
        return [i for i in range(first, self._before) if self.cached_tokens[i] is not self.tokens]

    def compact_caches(
        self,
        keys: Sequence[Tensor],  # per moving layer (B, Hk, L_i, D)
        values: Sequence[Tensor],  # per moving layer (B, Hk, L_i, D)
        *,
        to_front: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:  # per moving layer (B, Hk, left, D), views of the same memory
        """Stage 3: cuts the caches of the layers ``moving`` to what is left; ``held`` follows.

        The views are the ends of the caches. With `to_front` they are their beginnings, unless rows are padded.
        """
        layers = self.layers_to_compact
        if not layers:
            return []
        held = [self.cached_tokens[i] for i in layers]
        align_end = self.tokens.padded or not to_front
        cut = stages.evict(keys, values, held, self.tokens, align_end=align_end, backend=self.config.backend)
        for i in layers:
            self.cached_tokens[i] = self.tokens
        return cut
