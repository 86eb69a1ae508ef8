# SPDX-License-Identifier: Apache-2.0
"""MustDrop for an engine that packs its batches and pages its cache; docs/engines.md is its page.

Plan once per batch, run per layer, commit after prefill::

    plan = PackedPrompts(new_tokens, members, placeholders, config)
    for index, layer in enumerate(layers):
        plan.enter()
        hidden = layer(hidden, positions, metadata(plan.counts))
        if index in config.pruning_layers:
            rows = plan.prune(query, key, scale)
            hidden, positions = plan.take(hidden, rows), plan.take(positions, rows)
    plan.commit(keys, values, block_table)

No engine is imported here, and nothing outlives a batch: what a request has lost is the engine's to remember.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, stages
from .config import MustDropConfig
from .ops import TokenType
from .parallel import scores_over_ranks


class PackedPrompts:
    """R requests in one packed batch, of which M, the members, begin with images and lose vision tokens.

    Rows of the other requests, decoding ones too, go through untouched. "Live" are the rows that are left. Waits for
    the device once per pruning layer, for the lengths, which an engine's metadata has on the host.
    """

    def __init__(
        self,
        new: Sequence[int],  # rows of each of R requests
        members: Sequence[int],  # ascending; whole prompts, none of whose tokens were generated
        placeholders: Tensor,  # (rows) bool, vision tokens
        config: MustDropConfig,
        *,
        key: Tensor | None = None,  # (rows) bool, tokens that stage 1 protects
        group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: this rank has all
    ) -> None:
        self.config, self.members = config, list(members)
        self.counts = list(new)
        """Live rows of each request."""
        self.rows = torch.arange(sum(new), device=placeholders.device)
        """(live) int64, ascending: which rows of the batch they are."""
        self._new, self._stage = list(new), 0
        self._held: list[Tensor] = []  # per layer: the rows that its cache holds
        self._key = torch.zeros_like(placeholders) if key is None else key  # (live) bool
        self._types = torch.full_like(placeholders, int(TokenType.TEXT), dtype=torch.uint8)  # (live)
        place, real = self._padded()
        types = stages.token_types(placeholders[place] & real, real, config.votes)
        self._types[place[real]] = types[real]
        self._voters = (types == TokenType.QUERY).sum(1)  # (M), which no drop changes
        self._group = group
        self._most_voters = 0 if group is None else int(self._voters.max())

    @property
    def final(self) -> bool:
        """Nothing more will go."""
        return self._stage == len(self.config.pruning_layers)

    @property
    def dropped(self) -> list[int]:
        """Rows of each request that are gone."""
        return [new - left for new, left in zip(self._new, self.counts, strict=True)]

    # Before the layers.

    def leave_out(self, empty: Tensor) -> Tensor:  # (live) bool -> (left) int64
        """Takes placeholders away that stage 1 has emptied; returns which live rows go on."""
        ends = torch.tensor(self.counts, device=empty.device).cumsum(0)
        gone = torch.cat([ends.new_zeros(1), empty.cumsum(0)])[ends].tolist()
        before = [0, *gone[:-1]]
        self.counts = [count - (b - a) for count, a, b in zip(self.counts, before, gone, strict=True)]
        return self._go_on(torch.nonzero(~empty)[:, 0])

    # Layer by layer.

    def enter(self) -> None:
        """The next layer runs, and its cache will hold the live rows."""
        self._held.append(self.rows)

    def prune(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Drops what the text of each prompt does not look at.

        Args:
            query: (live, Hq, D), after RoPE, of the layer that has run; of this rank's heads.
            key: (live, Hk, D), after RoPE.
            scale: factor of the scores.

        Returns:
            (left) int64, ascending: which live rows go on.
        """
        place, real = self._padded()
        types, protected = self._types[place].masked_fill(~real, int(TokenType.PADDING)), self._key[place]
        scores = self._scores(query, key, scale, place, types)
        keep, counts = self._select(scores.total, scores.peak, types, protected)
        self._stage += 1
        pieces = list(torch.arange(len(self.rows), device=query.device).split(self.counts))
        for m, (request, count) in enumerate(zip(self.members, counts.tolist(), strict=True)):
            pieces[request] = place[m, keep[m, :count]]
            self.counts[request] = count
        return self._go_on(torch.cat(pieces))

    def _scores(self, query: Tensor, key: Tensor, scale: float, place: Tensor, types: Tensor) -> ops.Scores:
        """(M, L) each."""
        backend = self.config.backend
        if self._group is not None:
            query, key = query[place].transpose(1, 2), key[place].transpose(1, 2)  # (M, H, L, D)
            return scores_over_ranks(query, key, types, scale, self._most_voters, self._group, backend=backend)
        bounds = torch.tensor([0, *itertools.accumulate(self.counts)], dtype=torch.int32, device=query.device)
        longest = max(self.counts)
        scores = ops.text_vision_scores_varlen(
            query, key, self._types, bounds, bounds, longest, longest, scale, backend=backend
        )
        return ops.Scores(scores.total[place], scores.peak[place])

    def _select(self, total: Tensor, peak: Tensor, types: Tensor, protected: Tensor) -> ops.Selection:  # (M, L) each
        config = self.config
        common: dict[str, Any] = {"protected": protected, "backend": config.backend}
        if config.budgets is None:
            return ops.select_dual(total, peak, types, config.global_threshold, config.individual_threshold, **common)
        # Where no text follows the images nobody says which tokens matter, so all stay.
        budget = config.budgets[self._stage]
        budgets = torch.where(self._voters > 0, budget, types.shape[1]).int()
        return ops.select_topk(total, types, budget, budgets=budgets, **common)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:  # (live, ...) -> (left, ...)
        """The rows of hidden states, residuals or positions that go on."""
        count = torch.tensor([len(rows)], dtype=torch.int32, device=rows.device)
        return ops.gather_tokens(x[None], rows[None], count, backend=self.config.backend)[0]

    # After the layers.

    def commit(
        self,
        keys: Sequence[Tensor],  # per layer (blocks, slots, Hk, D), any strides
        values: Sequence[Tensor],  # per layer (blocks, slots, Hk, D), any strides
        block_table: Tensor,  # (R, max_blocks) int32
    ) -> None:
        """Stage 3: what is left of each member, of every layer, to where the layers after the last drop have it.

        A layer that ran before the last drop holds its rows from the first slot of the prompt on; one that ran after it
        from the first slot of block ``dropped // slots`` on, and so do all of them now. The blocks before are empty.
        """
        moving = [i for i, rows in enumerate(self._held) if rows is not self.rows]
        dropped = [self.dropped[request] for request in self.members]
        if not moving or not any(dropped):
            return
        backend, slots = self.config.backend, keys[0].shape[1]
        keys, values = [keys[i] for i in moving], [values[i] for i in moving]
        keep, counts = self._survivors([self._held[i] for i in moving])
        table = block_table[self.members]
        lost = torch.tensor(dropped, device=table.device)
        lengths = counts + lost.int()
        ops.compact_paged_kv_(
            keys, values, table, keep, [counts] * len(moving), seq_lens=lengths, align_end=True, backend=backend
        )
        # They stand at the end of the prompt now. Where the drop is no whole number of blocks, they move on, to the
        # first slot of the first block that they need.
        gap = (lost % slots)[:, None]
        if any(count % slots for count in dropped):
            place = torch.arange(keep[0].shape[1], device=table.device) + gap
            place = place.masked_fill(place >= counts[:, None] + gap, -1)
            ops.compact_paged_kv_(
                keys, values, without_leading(table, lost // slots), [place], [counts], backend=backend
            )

    def _survivors(self, held: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Where the members' rows stand in caches that hold `held`: (M, K) int64 each, -1 past counts (M) int32."""
        begins = torch.tensor([sum(self._new[:request]) for request in self.members], device=self.rows.device)
        counts = torch.tensor([self.counts[request] for request in self.members], device=begins.device)
        place, real = self._padded()
        rows = self.rows[place]  # (M, K)
        found: dict[int, Tensor] = {}
        for layer in held:
            if id(layer) not in found:
                slot = torch.searchsorted(layer, rows) - torch.searchsorted(layer, begins)[:, None]
                found[id(layer)] = slot.masked_fill(~real, -1)
        return [found[id(layer)] for layer in held], counts.int()

    def _padded(self) -> tuple[Tensor, Tensor]:
        """The members' live rows as (M, L), and which of them are real; the others are row 0."""
        begins = [0, *itertools.accumulate(self.counts)]
        device = self.rows.device
        first = torch.tensor([begins[request] for request in self.members], device=device)[:, None]
        count = torch.tensor([self.counts[request] for request in self.members], device=device)[:, None]
        column = torch.arange(max(self.counts[request] for request in self.members), device=device)
        real = column < count
        return torch.where(real, first + column, 0), real

    def _go_on(self, chosen: Tensor) -> Tensor:
        self.rows, self._types, self._key = self.rows[chosen], self._types[chosen], self._key[chosen]
        return chosen


def without_leading(table: Tensor, blocks: Tensor) -> Tensor:
    """(R, M) block tables without the first blocks[b] entries of row b; the last entries repeat."""
    column = torch.arange(table.shape[1], device=table.device) + blocks[:, None]
    return table.gather(1, column.clamp(max=table.shape[1] - 1))
