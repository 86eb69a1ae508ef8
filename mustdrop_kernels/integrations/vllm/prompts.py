# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on a packed batch: what is left of the prompts with images, among the rows of other requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops, stages
from ...config import MustDropConfig
from ...ops import TokenType
from .batch import Batch


class Prompts:
    """The rows of a step on their way through the layers. Rows of requests without a new image all stay."""

    def __init__(
        self,
        batch: Batch,
        placeholders: Tensor,  # (rows) bool
        key: Tensor | None,  # (rows) bool, key tokens; None: there are none
        config: MustDropConfig,
    ) -> None:
        self.batch, self.config = batch, config
        self.members = [i for i, image in enumerate(batch.images) if image]  # the requests that lose tokens
        self.counts = list(batch.new)  # rows left of each request
        self.rows = torch.arange(batch.rows, device=placeholders.device)  # (live) which rows they are
        self.types = torch.full_like(placeholders, int(TokenType.TEXT), dtype=torch.uint8)  # (live)
        self.key = torch.zeros_like(placeholders) if key is None else key  # (live)
        place, real = self._padded()
        types = stages.token_types(placeholders[place] & real, real, config.votes)
        self.types[place[real]] = types[real]
        self._voters = (types == TokenType.QUERY).any(1)
        self._stage = 0

    @property
    def final(self) -> bool:
        """Nothing more will go."""
        return self._stage == len(self.config.pruning_layers)

    @property
    def lost(self) -> list[int]:
        """Tokens that each sequence has lost, in earlier steps or in this one."""
        gone = zip(self.batch.lost, self.batch.new, self.counts, strict=True)
        return [before + new - left for before, new, left in gone]

    def _padded(self) -> tuple[Tensor, Tensor]:
        """The live rows of the members as (M, L), and which of them are real; the others are row 0."""
        begins = list(itertools.accumulate(self.counts, initial=0))
        device = self.rows.device
        first = torch.tensor([begins[i] for i in self.members], device=device)[:, None]
        count = torch.tensor([self.counts[i] for i in self.members], device=device)[:, None]
        column = torch.arange(max(self.counts[i] for i in self.members), device=device)
        real = column < count
        return torch.where(real, first + column, 0), real

    def leave_out(self, empty: Tensor) -> Tensor:  # (live) bool -> (left) int64
        """Takes empty placeholders away; returns which live rows go on."""
        ends = torch.tensor(self.counts, device=empty.device).cumsum(0)
        gone = torch.cat([ends.new_zeros(1), empty.cumsum(0)])
        gone = gone[ends].tolist()
        self.counts = [n - (b - a) for n, a, b in zip(self.counts, [0, *gone], gone, strict=False)]
        return self._go_on(torch.nonzero(~empty)[:, 0])

    def prune(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Drops what the text of each prompt does not look at; returns which live rows go on.

        Args:
            query: (live, Hq, D), after RoPE.
            key: (live, Hk, D), after RoPE.
            scale: factor of the scores.
        """
        bounds = torch.tensor(list(itertools.accumulate(self.counts, initial=0)), device=query.device).int()
        longest, backend = max(self.counts), self.config.backend
        scores = ops.text_vision_scores_varlen(
            query, key, self.types, bounds, bounds, longest, longest, scale, backend=backend
        )
        place, real = self._padded()
        types, key_tokens = self.types[place].masked_fill(~real, 0), self.key[place]
        keep, counts = self._select(scores.total[place], scores.peak[place], types, key_tokens)
        self._stage += 1
        pieces = list(torch.arange(len(self.rows), device=query.device).split(self.counts))
        for m, (i, count) in enumerate(zip(self.members, counts.tolist(), strict=True)):
            pieces[i] = place[m, keep[m, :count]]
            self.counts[i] = count
        return self._go_on(torch.cat(pieces))

    def _select(self, total: Tensor, peak: Tensor, types: Tensor, key: Tensor) -> ops.Selection:  # (M, L) each
        config = self.config
        kept: dict[str, Any] = {"protected": key, "backend": config.backend}
        if config.budgets is None:
            return ops.select_dual(total, peak, types, config.global_threshold, config.individual_threshold, **kept)
        # Where no text follows the images nobody says which tokens matter, so all stay.
        budget = config.budgets[self._stage]
        budgets = torch.where(self._voters, budget, types.shape[1]).int()
        return ops.select_topk(total, types, budget, budgets=budgets, **kept)

    def _go_on(self, chosen: Tensor) -> Tensor:
        self.rows, self.types, self.key = self.rows[chosen], self.types[chosen], self.key[chosen]
        return chosen


def survivors(
    prompts: Prompts,
    held: Sequence[Tensor],  # per layer (live then) int64: the rows that its cache holds
) -> tuple[list[Tensor], Tensor]:
    """Where each member's final tokens stand in each layer's cache: per layer (M, K) int64, -1 past counts (M) int32."""
    begins = torch.tensor([sum(prompts.batch.new[:i]) for i in prompts.members], device=prompts.rows.device)
    counts = torch.tensor([prompts.counts[i] for i in prompts.members], device=begins.device)
    place, real = prompts._padded()
    rows = prompts.rows[place]  # (M, K)
    found: dict[int, Tensor] = {}
    for layer in held:
        if id(layer) not in found:
            slot = torch.searchsorted(layer, rows) - torch.searchsorted(layer, begins)[:, None]
            found[id(layer)] = slot.masked_fill(~real, -1)
    return [found[id(layer)] for layer in held], counts.int()
