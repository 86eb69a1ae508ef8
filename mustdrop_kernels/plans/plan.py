# SPDX-License-Identifier: Apache-2.0
"""The protocol of a drop plan, independent of the layout of the batch."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from .. import ops, stages
from ..config import MustDropConfig
from ..parallel import scores_over_ranks
from ..stages import Pruned, Tokens

Chosen = TypeVar("Chosen")
"""The remaining rows in the form of a layout: the result of ``prune``, an argument of ``take``."""


class DropPlan(abc.ABC, Generic[Chosen]):
    """Stages 2 and 3 of MustDrop for B prompts with images; each layout of the batch is a subclass.

    With budgets nothing synchronizes with the device or copies to it once the plan is made. With thresholds ``prune``
    synchronizes once, to read the lengths. All work goes to the current stream.
    """

    def __init__(
        self,
        tokens: Tokens,
        config: MustDropConfig,
        *,
        text_queries: Sequence[int],  # number of text query rows of each prompt; drops do not change it
        group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: this rank has all
    ) -> None:
        self.config = config
        self.tokens = tokens
        """The remaining tokens of the prompts, and their places in the plain prompts."""
        self.cached_tokens: list[Tokens] = []
        """Per layer: the tokens whose keys and values its cache holds."""
        self._stage = 0  # pruning layers that have run
        self._layers_before_last_drop = 0
        self._group, self._max_text_queries = group, max(text_queries)

    @property
    def final(self) -> bool:
        """True after the last pruning layer: no more tokens are dropped."""
        return self._stage == len(self.config.pruning_layers)

    def begin_layer(self) -> None:
        """Records that the cache of the next layer will hold the remaining tokens."""
        self.cached_tokens.append(self.tokens)

    def prune(self, query: Tensor, key: Tensor, scale: float, *, lse: Tensor | None = None) -> Chosen:
        """Drops the vision tokens that the text queries of each prompt attend to least.

        Args:
            query: queries of the current layer after RoPE, in the layout's shape; heads of this rank.
            key: keys of the same layer and rank.
            scale: factor of the scores.
            lse: float32, natural logarithm of the sum of exponentials of each query row's scaled scores, heads before
                rows; computed if None.

        Returns:
            The remaining rows, for ``take``.
        """
        scores = self.scores(query.detach(), key.detach(), scale, None if lse is None else lse.detach())
        pruned = stages.select(scores, self.tokens, self.config, self._stage)
        self._stage += 1
        self._layers_before_last_drop = len(self.cached_tokens)
        return self._keep(pruned)

    @abc.abstractmethod
    def take(self, x: Tensor, chosen: Chosen) -> Tensor:
        """The remaining rows of hidden states, residuals or positions."""

    @abc.abstractmethod
    def scores(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> ops.Scores:
        """Scores (B, L) of ``tokens``, averaged over the heads of all ranks."""

    @abc.abstractmethod
    def _keep(self, pruned: Pruned) -> Chosen:
        """Replaces ``tokens`` by the remaining ones and returns their rows."""

    def _text_scores(
        self,
        query: Tensor,  # (B, Hq, L, D)
        key: Tensor,  # (B, Hk, Lk, D)
        key_types: Tensor,  # (B, Lk) uint8
        scale: float,
        lse: Tensor | None,  # (B, Hq, L) float32
    ) -> ops.Scores:  # (B, Lk) each
        backend = self.config.backend
        if self._group is None:
            return ops.text_vision_scores(query, key, key_types, scale, lse=lse, backend=backend)
        limit = self._max_text_queries
        return scores_over_ranks(query, key, key_types, scale, limit, self._group, lse=lse, backend=backend)
