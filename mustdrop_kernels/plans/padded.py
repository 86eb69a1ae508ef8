# SPDX-License-Identifier: Apache-2.0
"""Drop plan of batches that are padded to one length, with a dense cache per layer: Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, stages
from ..config import MustDropConfig
from ..stages import Pruned, Tokens
from .plan import DropPlan


class PaddedDropPlan(DropPlan["Pruned | None"]):
    """B prompts as (B, L), padded on the left after drops. ``None`` as the remaining rows means all rows."""

    def __init__(
        self,
        tokens: Tokens,
        config: MustDropConfig,
        *,
        text_queries: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(tokens, config, text_queries=text_queries, group=group)
        self.prompt_tokens = tokens
        """The tokens of the plain prompts."""
        self.past_types: Tensor | None = None
        """(B, P) uint8: types of P cached tokens before the prompts in the current layer. None of them is dropped."""
        self.mask: Tensor | None = None
        """(B, H or 1, L, P + L): the mask of the current layer, bool or added to the scores; None: causal."""

    @property
    def nothing_dropped(self) -> bool:
        """Whether no token has been dropped yet, so that the model's own inputs are valid."""
        return self.tokens is self.prompt_tokens

    def drop_empty(self, empty: Tensor, lengths: tuple[int, ...]) -> Pruned | None:
        """Drops the placeholders that hold no token after stage 1.

        Args:
            empty: (B, L) bool.
            lengths: number of remaining tokens of each prompt.
        """
        return self._keep(stages.drop_empty(self.tokens, empty, lengths, backend=self.config.backend))

    @property
    def key_types(self) -> Tensor:  # (B, P + L) uint8
        """Token types of the keys of the current layer."""
        return self.tokens.types if self.past_types is None else torch.cat([self.past_types, self.tokens.types], dim=1)

    def scores(  # (B, Hq, L, D), (B, Hk, P + L, D), (B, Hq, L)
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> ops.Scores:
        """See ``DropPlan.scores``."""
        types = self.key_types
        if self.mask is None:
            scores = self._text_scores(query, key, types, scale, lse)
        else:
            scores = stages.masked_scores(query, key, types, scale, self.mask, group=self._group)
        past = types.shape[1] - self.tokens.length
        return ops.Scores(*(score[:, past:] for score in scores)) if past else scores

    def _keep(self, pruned: Pruned) -> Pruned | None:
        if pruned.lengths == self.tokens.lengths:
            return None
        renumber = self.config.positions == "published"
        self.tokens = self.tokens.take(pruned, renumber=renumber, backend=self.config.backend)
        return pruned

    def take(self, x: Tensor, chosen: Pruned | None) -> Tensor:  # (B, L, ...) -> (B, remaining, ...)
        """The remaining rows of hidden states."""
        if chosen is None:
            return x
        return chosen.take(x, backend=self.config.backend)

    @property
    def layers_to_compact(self) -> list[int]:
        """The layers whose caches stage 3 cuts."""
        first = self.config.first_evicted_layer
        if first is None:
            return []
        return [i for i in range(first, self._layers_before_last_drop) if self.cached_tokens[i] is not self.tokens]

    def compact_caches(
        self,
        keys: Sequence[Tensor],  # per layer to compact (B, Hk, L_i, D)
        values: Sequence[Tensor],  # per layer to compact (B, Hk, L_i, D)
        *,
        to_front: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:  # per layer to compact (B, Hk, remaining, D), views of the same memory
        """Stage 3: cuts the caches of ``layers_to_compact`` to the remaining tokens in place, and ``cached_tokens``.

        The views are the ends of the caches or, with `to_front` and without padding, their beginnings.
        """
        layers = self.layers_to_compact
        if not layers:
            return []
        cached = [self.cached_tokens[i] for i in layers]
        align_end = self.tokens.padded or not to_front
        views = stages.evict(keys, values, cached, self.tokens, align_end=align_end, backend=self.config.backend)
        for i in layers:
            self.cached_tokens[i] = self.tokens
        return views
