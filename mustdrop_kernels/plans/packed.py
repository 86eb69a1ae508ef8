# SPDX-License-Identifier: Apache-2.0
"""Drop plan of packed batches with paged caches: vLLM, SGLang."""

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
    """Drop plan of R requests in one packed batch, M of which, the members, are prompts with images.

    Rows of the other requests, decoding ones included, pass through unchanged. Live rows are those not dropped yet.
    ``tokens`` holds the members' tokens as (M, L); its index is the row of the batch.
    """

    def __init__(
        self,
        new: Sequence[int],  # rows of each of R requests
        members: Sequence[int],  # ascending, at least one; whole prompts, none of whose tokens were generated
        placeholders: Tensor,  # (rows) bool, vision tokens
        config: MustDropConfig,
        *,
        is_key_token: Tensor | None = None,  # (rows) bool, tokens that stage 1 protects
        group: dist.ProcessGroup | None = None,
    ) -> None:
        device = placeholders.device
        self.members = list(members)
        self.counts = list(new)
        """Live rows of each request."""
        self.rows = torch.arange(sum(new), device=device)
        """(live) int64, ascending: the live rows of the batch."""
        self._new = list(new)
        self._counts = self._new_counts = torch.tensor(self._new, device=device)  # (R), as `counts`
        self._members = torch.tensor(self.members, device=device)  # (M)
        place, real = self._padded()
        tokens, text_queries = _read_tokens(place, real, placeholders, is_key_token, config)
        self._types = _packed_types(tokens.types, place, real, len(self.rows))
        super().__init__(tokens, config, text_queries=text_queries, group=group)

    @property
    def dropped(self) -> list[int]:
        """Number of dropped rows of each request."""
        return [new - count for new, count in zip(self._new, self.counts, strict=True)]

    @property
    def lost(self) -> Tensor:
        """(R) int64: ``dropped`` on the device."""
        return self._new_counts - self._counts

    @property
    def live_counts(self) -> Tensor:
        """(R) int64: ``counts`` on the device."""
        return self._counts

    # Before the layers.

    def drop_empty(self, empty: Tensor) -> Tensor:  # (live) bool, of members -> (remaining) int64
        """Drops the placeholders that hold no token after stage 1; synchronizes with the device.

        The last row of a prompt remains, since it is the output.

        Returns:
            The remaining rows, as indices into the live rows.
        """
        place, real = self._padded()
        dropped = empty[place] & real & ~stages.last_tokens(real)
        pairs = zip(self.tokens.lengths, dropped.sum(1).tolist(), strict=True)
        lengths = tuple(length - count for length, count in pairs)
        return self._keep(stages.drop_empty(self.tokens, dropped, lengths, backend=self.config.backend))

    # Layer by layer.

    def scores(  # (live, Hq, D), (live, Hk, D), (Hq, live)
        self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None
    ) -> ops.Scores:
        """See ``DropPlan.scores``."""
        place, _ = self._padded()
        if self._group is not None:
            lse = None if lse is None else lse[:, place].transpose(0, 1)
            query, key = (x[place].transpose(1, 2) for x in (query, key))
            return self._text_scores(query, key, self.tokens.types, scale, lse)
        bounds = torch.cat([self._counts.new_zeros(1), self._counts.cumsum(0)]).int()
        longest = max(self.counts)
        packed = (query, key, self._types, bounds, bounds, longest, longest, scale)
        total, peak = ops.text_vision_scores_varlen(*packed, lse=lse, backend=self.config.backend)
        return ops.Scores(total[place], peak[place])

    def take(self, x: Tensor, chosen: Tensor) -> Tensor:  # (live, ...), (remaining) int64 -> (remaining, ...)
        """The remaining rows of hidden states, residuals or positions."""
        count = torch.full((1,), len(chosen), dtype=torch.int32, device=x.device)
        return ops.gather_tokens(x[None], chosen[None], count, backend=self.config.backend)[0]

    def _keep(self, pruned: Pruned) -> Tensor:
        """(remaining) int64, ascending: indices into the live rows."""
        place, _ = self._padded()
        pieces = list(torch.arange(len(self.rows), device=place.device).split(self.counts))
        for m, (request, count) in enumerate(zip(self.members, pruned.lengths, strict=True)):
            pieces[request] = place[m, pruned.keep[m, :count]]
            self.counts[request] = count
        self._counts = self._counts.index_copy(0, self._members, pruned.counts.long())
        self.tokens = self.tokens.take(pruned, backend=self.config.backend)
        chosen = torch.cat(pieces)
        self.rows, self._types = self.rows[chosen], self._types[chosen]
        return chosen

    def _padded(self) -> tuple[Tensor, Tensor]:
        """The members' live rows in the layout (M, L) of ``tokens``, and a mask of real entries; padding is row 0."""
        longest = max(self.counts[request] for request in self.members)
        column = torch.arange(longest, device=self.rows.device) - longest
        end, count = self._counts.cumsum(0)[self._members, None], self._counts[self._members, None]
        real = column >= -count
        return (end + column).masked_fill(~real, 0), real

    # After the layers.

    def compact_caches(
        self,
        keys: Sequence[Tensor],  # per layer (blocks, page_size, Hk, D), any strides
        values: Sequence[Tensor],  # per layer (blocks, page_size, Hk, D), any strides
        block_table: Tensor,  # (R, max_blocks) int32
    ) -> None:
        """Stage 3: moves the remaining keys and values of each member to the same slots in all layers.

        A layer that ran before the last drop holds its rows from the first slot of the prompt on. Afterwards all layers
        hold them from the first slot of block ``dropped // page_size`` on, as those that ran after the last drop do;
        the blocks before it are empty.
        """
        layers = range(self._layers_before_last_drop)
        dropped = [self.dropped[request] for request in self.members]
        if not layers or not any(dropped):
            return
        backend, page_size, counts = self.config.backend, keys[0].shape[1], self.tokens.counts
        keys, values = [keys[i] for i in layers], [values[i] for i in layers]
        table, lost, lengths = (x[self._members] for x in (block_table, self.lost, self._new_counts.int()))
        keep = self._first_slots([self.cached_tokens[i] for i in layers])
        ops.compact_paged_kv_(
            keys, values, table, keep, [counts] * len(layers), seq_lens=lengths, align_end=True, backend=backend
        )
        # The remaining entries are at the end of the prompt. Unless the drop is a whole number of blocks, a second pass
        # moves them to the first slot of their first block.
        if any(count % page_size for count in dropped):
            gap = (lost % page_size)[:, None]
            place = torch.arange(self.tokens.length, device=table.device) + gap
            place = place.masked_fill(place >= counts[:, None] + gap, -1)
            table = skip_leading_blocks(table, lost // page_size)
            ops.compact_paged_kv_(keys, values, table, [place], [counts], backend=backend)

    def _first_slots(self, cached: Sequence[Tokens]) -> list[Tensor]:
        """Per layer (M, L): the slot of each survivor in a cache of `cached` from slot 0 on; -1 past the counts."""
        past = torch.arange(self.tokens.length, device=self.rows.device) >= self.tokens.counts[:, None]
        found = stages.slots_of(cached, self.tokens)
        first: dict[int, Tensor] = {}
        for slots, tokens in zip(found, cached, strict=True):
            if id(tokens) not in first:
                first[id(tokens)] = (slots - tokens.length + tokens.counts[:, None]).masked_fill(past, -1)
        return [first[id(tokens)] for tokens in cached]


def _read_tokens(
    place: Tensor,  # (M, L) int64, rows of the batch
    real: Tensor,  # (M, L) bool
    placeholders: Tensor,  # (rows) bool
    is_key_token: Tensor | None,  # (rows) bool
    config: MustDropConfig,
) -> tuple[Tokens, list[int]]:
    """The members' tokens and numbers of text queries. Synchronizes with the device once, to read the counts."""
    types = stages.token_types(placeholders[place] & real, real, config.text_queries)
    text_query, vision = types == TokenType.QUERY, types == TokenType.VISION
    # All vision tokens stay where no text follows the images, since there are no text queries to score them.
    protected = vision & ~text_query.any(1, keepdim=True)
    if is_key_token is not None:
        protected |= vision & is_key_token[place]
    flags = torch.stack([real, vision, protected, text_query]).sum(2)
    lengths, vision_counts, key_counts, text_queries = flags.tolist()
    index = place.masked_fill(~real, -1)
    tokens = Tokens(
        types=types,
        index=index,
        positions=index,  # unused: the engine has its own
        protected=protected,
        counts=flags[0].int(),
        lengths=tuple(lengths),
        vision_token_counts=tuple(vision_counts),
        key_token_counts=tuple(key_counts),
    )
    return tokens, text_queries


def _packed_types(types: Tensor, place: Tensor, real: Tensor, rows: int) -> Tensor:  # (M, L) each -> (rows) uint8
    """The members' types at their rows of the batch; rows of other requests are text that is no query."""
    packed = torch.full((rows + 1,), int(TokenType.TEXT), dtype=torch.uint8, device=types.device)
    packed[place.masked_fill(~real, rows)] = types  # the last row takes the padding
    return packed[:rows]


def skip_leading_blocks(block_table: Tensor, blocks: Tensor) -> Tensor:
    """Block tables (R, max_blocks) without the first blocks[r] entries of row r; the last entry repeats at the end."""
    column = torch.arange(block_table.shape[1], device=block_table.device) + blocks[:, None]
    return block_table.gather(1, column.clamp(max=block_table.shape[1] - 1))
