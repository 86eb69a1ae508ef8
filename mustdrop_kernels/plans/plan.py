# SPDX-License-Identifier: Apache-2.0
"""The protocol: what a batch of prompts goes through, however its rows lie."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from .. import stages
from ..config import MustDropConfig
from ..parallel import scores_over_ranks
from ..stages import Pruned, Tokens

Chosen = TypeVar("Chosen")
"""How a layout says which of its rows go on: what ``prune`` returns and ``take`` takes."""


class DropPlan(abc.ABC, Generic[Chosen]):
    """B prompts with images on their way through the layers; a class per layout says where their rows are.

    With budgets nothing waits for the device, nor is anything copied to it, once the plan is made. With thresholds
    ``prune`` waits once, for the lengths. All work goes to the current stream.
    """

    def __init__(
        self,
        tokens: Tokens,
        config: MustDropConfig,
        *,
        voters: Sequence[int],  # text rows that vote in each prompt; no drop changes them
        group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: this rank has all
    ) -> None:
        self.config = config
        self.tokens = tokens
        """What is left of the prompts, and where it came from."""
        self.cached_tokens: list[Tokens] = []
        """Per layer: the tokens whose keys and values its cache holds."""
        self._stage = 0  # pruning layers that have run
        self._before = 0  # layers that ran before the last of their drops
        self._group, self._most_voters = group, max(voters)

    @property
    def final(self) -> bool:
        """Nothing more will go."""
        return self._stage == len(self.config.pruning_layers)

    def begin_layer(self) -> None:
        """The next layer runs, and its cache will hold what is left."""
        self.cached_tokens.append(self.tokens)

    def prune(self, query: Tensor, key: Tensor, scale: float, *, lse: Tensor | None = None) -> Chosen:
        """Drops what the text of each prompt does not look at.

        Args:
            query: after RoPE, of the layer that runs, in the layout's shape; of this rank's heads.
            key: the same of its keys.
            scale: factor of the scores.
            lse: float32, natural logarithm of the sum of exponentials of each query row's scaled scores, heads before
                rows, if the attention has said it; else it is computed.

        Returns:
            Which rows go on, for ``take``.
        """
        lse = None if lse is None else lse.detach()
        pruned = self._decide(query.detach(), key.detach(), scale, lse)
        self._stage += 1
        self._before = len(self.cached_tokens)
        return self._go_on(pruned)

    @abc.abstractmethod
    def take(self, x: Tensor, chosen: Chosen) -> Tensor:
        """The rows of hidden states, residuals or positions that go on."""

    @abc.abstractmethod
    def _decide(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> Pruned:
        """This stage's scores and selection."""

    @abc.abstractmethod
    def _go_on(self, pruned: Pruned) -> Chosen:
        """Moves on to the tokens that are left."""

    def _decide_over_ranks(
        self,
        query: Tensor,  # (B, Hq / ranks, L, D)
        key: Tensor,  # (B, Hk / ranks, L, D)
        scale: float,
        lse: Tensor | None,  # (B, Hq / ranks, L)
    ) -> Pruned:
        """The same decision on all ranks: they see the same scores."""
        types, backend = self.tokens.types, self.config.backend
        scores = scores_over_ranks(query, key, types, scale, self._most_voters, self._group, lse=lse, backend=backend)
        return stages.select(scores, self.tokens, self.config, self._stage)
