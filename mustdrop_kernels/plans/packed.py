# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows are packed, with paged caches: vLLM, SGLang."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, stages
from ..config import MustDropConfig
from ..ops import TokenType
from ..stages import Pruned, Tokens
from .plan import DropPlan


class PackedDropPlan(DropPlan[Tensor]):
    """R requests in one packed batch, of which M, the members, begin with images and lose vision tokens.

    Rows of the other requests, decoding ones too, go through untouched. "Live" are the rows that are left. ``tokens``
    are the members', as (M, L), and name a token by its row of the batch.
    """

    def __init__(
        self,
        new: Sequence[int],  # rows of each of R requests
        members: Sequence[int],  # ascending, at least one; whole prompts, none of whose tokens were generated
        placeholders: Tensor,  # (rows) bool, vision tokens
        config: MustDropConfig,
        *,
        key: Tensor | None = None,  # (rows) bool, tokens that stage 1 protects
        group: dist.ProcessGroup | None = None,
    ) -> None:
        device = placeholders.device
        self.members = list(members)
        self.counts = list(new)
        """Live rows of each request."""
        self.rows = torch.arange(sum(new), device=device)
        """(live) int64, ascending: which rows of the batch they are."""
        self._new = list(new)
        self._counts = self._whole = torch.tensor(self._new, device=device)  # (R), as `counts`
        self._who = torch.tensor(self.members, device=device)  # (M)
        place, real = self._padded()
        tokens, voters = _read(place, real, placeholders, key, config.votes)
        self._types = _packed(tokens.types, place, real, len(self.rows))
        super().__init__(tokens, config, voters=voters, group=group)

    @property
    def dropped(self) -> list[int]:
        """Rows of each request that are gone."""
        return [new - left for new, left in zip(self._new, self.counts, strict=True)]

    @property
    def lost(self) -> Tensor:
        """(R) int64: ``dropped``, on the device."""
        return self._whole - self._counts

    # Before the layers.

    def drop_empty(self, empty: Tensor) -> Tensor:  # (live) bool, of members -> (left) int64
        """Takes placeholders away that stage 1 has emptied; returns which live rows go on. Waits for the device."""
        place, real = self._padded()
        gone = empty[place] & real
        lengths = zip(self.tokens.lengths, gone.sum(1).tolist(), strict=True)
        left = tuple(length - count for length, count in lengths)
        return self._go_on(stages.drop_empty(self.tokens, gone, left, backend=self.config.backend))

    # Layer by layer.

    def _decide(  # (live, Hq, D), (live, Hk, D), (Hq, live)
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> Pruned:
        place, _ = self._padded()
        if self._group is not None:
            rows = lse if lse is None else lse[:, place].transpose(0, 1)
            return self._decide_over_ranks(query[place].transpose(1, 2), key[place].transpose(1, 2), scale, rows)
        bounds = torch.cat([self._counts.new_zeros(1), self._counts.cumsum(0)]).int()
        longest = max(self.counts)
        packed = (query, key, self._types, bounds, bounds, longest, longest, scale)
        total, peak = ops.text_vision_scores_varlen(*packed, lse=lse, backend=self.config.backend)
        return stages.select(ops.Scores(total[place], peak[place]), self.tokens, self.config, self._stage)

    def take(self, x: Tensor, chosen: Tensor) -> Tensor:  # (live, ...), (left) int64 -> (left, ...)
        """The rows of hidden states, residuals or positions that go on."""
        count = torch.full((1,), len(chosen), dtype=torch.int32, device=x.device)
        return ops.gather_tokens(x[None], chosen[None], count, backend=self.config.backend)[0]

    def _go_on(self, pruned: Pruned) -> Tensor:
        """(left) int64, ascending: which live rows go on."""
        place, _ = self._padded()
        pieces = list(torch.arange(len(self.rows), device=place.device).split(self.counts))
        for m, (request, count) in enumerate(zip(self.members, pruned.lengths, strict=True)):
            pieces[request] = place[m, pruned.keep[m, :count]]
            self.counts[request] = count
        self._counts = self._counts.index_copy(0, self._who, pruned.counts.long())
        self.tokens = self.tokens.take(pruned, backend=self.config.backend)
        chosen = torch.cat(pieces)
        self.rows, self._types = self.rows[chosen], self._types[chosen]
        return chosen

    def _padded(self) -> tuple[Tensor, Tensor]:
        """The members' live rows as (M, L), where ``tokens`` has them, and which are real; the others are row 0."""
        longest = max(self.counts[request] for request in self.members)
        column = torch.arange(longest, device=self.rows.device) - longest
        end, count = self._counts.cumsum(0)[self._who, None], self._counts[self._who, None]
        real = column >= -count
        return (end + column).masked_fill(~real, 0), real

    # After the layers.

    def compact_caches(
        self,
        keys: Sequence[Tensor],  # per layer (blocks, slots, Hk, D), any strides
        values: Sequence[Tensor],  # per layer (blocks, slots, Hk, D), any strides
        block_table: Tensor,  # (R, max_blocks) int32
    ) -> None:
        """Stage 3: what is left of each member, of every layer, to where the layers after the last drop have it.

        A layer that ran before the last drop holds its rows from the first slot of the prompt on; one that ran after it
        from the first slot of block ``dropped // slots`` on, and so do all of them now. The blocks before are empty.
        """
        moving = range(self._before)
        dropped = [self.dropped[request] for request in self.members]
        if not moving or not any(dropped):
            return
        backend, slots, counts = self.config.backend, keys[0].shape[1], self.tokens.counts
        keys, values = [keys[i] for i in moving], [values[i] for i in moving]
        table, lost, lengths = block_table[self._who], self.lost[self._who], self._whole[self._who].int()
        keep = self._first_slots([self.cached_tokens[i] for i in moving])
        ops.compact_paged_kv_(
            keys, values, table, keep, [counts] * len(moving), seq_lens=lengths, align_end=True, backend=backend
        )
        # They stand at the end of the prompt now. Where the drop is no whole number of blocks, they move on, to the
        # first slot of the first block that they need.
        if any(count % slots for count in dropped):
            gap = (lost % slots)[:, None]
            place = torch.arange(self.tokens.length, device=table.device) + gap
            place = place.masked_fill(place >= counts[:, None] + gap, -1)
            ops.compact_paged_kv_(
                keys, values, skip_leading_blocks(table, lost // slots), [place], [counts], backend=backend
            )

    def _first_slots(self, held: Sequence[Tokens]) -> list[Tensor]:
        """Per layer (M, L): the slot of each survivor, -1 past the counts, where caches hold `held` from slot 0 on."""
        past = torch.arange(self.tokens.length, device=self.rows.device) >= self.tokens.counts[:, None]
        found = stages.slots_of(held, self.tokens)
        first: dict[int, Tensor] = {}
        for slots, tokens in zip(found, held, strict=True):
            if id(tokens) not in first:
                first[id(tokens)] = (slots - tokens.length + tokens.counts[:, None]).masked_fill(past, -1)
        return [first[id(tokens)] for tokens in held]


def _read(
    place: Tensor,  # (M, L) int64, rows of the batch
    real: Tensor,  # (M, L) bool
    placeholders: Tensor,  # (rows) bool
    key: Tensor | None,  # (rows) bool
    votes: str,
) -> tuple[Tokens, list[int]]:
    """The members' tokens, and how many rows vote in each. Waits for the device once, to learn their numbers."""
    vision = placeholders[place] & real
    types = stages.token_types(vision, real, votes)
    voter = types == TokenType.QUERY
    # Where no text follows the images nobody says which tokens matter, so all stay.
    protected = vision & ~voter.any(1, keepdim=True)
    if key is not None:
        protected |= vision & key[place]
    flags = torch.stack([real, vision, protected, voter]).sum(2)
    lengths, seen, keys, voters = flags.tolist()
    index = place.masked_fill(~real, -1)
    tokens = Tokens(
        types=types,
        index=index,
        positions=index,  # the engine has its own
        protected=protected,
        counts=flags[0].int(),
        lengths=tuple(lengths),
        vision=tuple(seen),
        keys=tuple(keys),
    )
    return tokens, voters


def _packed(types: Tensor, place: Tensor, real: Tensor, rows: int) -> Tensor:  # (M, L) each -> (rows) uint8
    """The members' types at their rows; the other requests' rows are text, of which nobody votes."""
    packed = torch.full((rows + 1,), int(TokenType.TEXT), dtype=torch.uint8, device=types.device)
    packed[place.masked_fill(~real, rows)] = types  # the last row takes the padding
    return packed[:rows]


def skip_leading_blocks(table: Tensor, blocks: Tensor) -> Tensor:
    """(R, M) block tables without the first blocks[b] entries of row b; the last entries repeat."""
    column = torch.arange(table.shape[1], device=table.device) + blocks[:, None]
    return table.gather(1, column.clamp(max=table.shape[1] - 1))
