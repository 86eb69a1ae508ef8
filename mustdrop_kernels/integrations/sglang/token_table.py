# SPDX-License-Identifier: Apache-2.0
"""Dropping at page size 1: a token keeps its slot in every layer, so no keys and values move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...plans import PackedDropPlan


class TokenTable:
    """The rows of ``ReqToTokenPool.req_to_token`` of one extend step, R requests long.

    The leading entries of a member's row become the slots of its remaining tokens. ``free_dropped_slots`` returns the
    slots of dropped tokens to the allocator, after the last layer that reads them::

        table = TokenTable(plan, batch.reqs, req_to_token_pool.req_to_token, batch.out_cache_loc)
        for index, layer in enumerate(layers):
            plan.begin_layer()
            hidden = layer(...)  # keys and values go to forward_batch.out_cache_loc
            if index in config.pruning_layers:
                ... = plan.take(..., plan.prune(query, key, scale))
                forward_batch.out_cache_loc = table.update_rows()
                forward_batch.seq_lens = batch.seq_lens - plan.lost
        table.free_dropped_slots(token_to_kv_pool_allocator)
        batch.seq_lens -= plan.lost
    """

    def __init__(
        self,
        plan: PackedDropPlan,
        requests: Sequence[Any],  # R, each with SGLang's ``kv`` record, of its row in the table and its lengths
        req_to_token: Tensor,  # (rows of the pool, context) int32
        out_cache_loc: Tensor,  # (rows of the batch) int64, slot of each new token
    ) -> None:
        """Raises ``ValueError`` for slots of the prefix cache, and for prompts that are not all in this step."""
        self._plan, self._requests, self._slots, self._table = plan, list(requests), out_cache_loc, req_to_token
        for member in plan.members:
            kv, new = self._requests[member].kv, plan.counts[member] + plan.dropped[member]
            if kv.cache_protected_len:
                raise ValueError(
                    f"request {member}: its first {kv.cache_protected_len} tokens belong to the prefix cache, and what "
                    "is dropped would be missing there; disable_radix_cache keeps prompts apart"
                )
            if not kv.kv_committed_len == kv.kv_allocated_len == new:
                raise ValueError(
                    f"request {member}: a prompt with images is read in one step, but {new} of its "
                    f"{kv.kv_allocated_len} tokens are in this one; chunked_prefill_size must be at least as long"
                )

    def update_rows(self) -> Tensor:  # (live) int64
        """Updates the table after each drop, ``plan.drop_empty`` included; returns the slots of the live rows."""
        slots = self._slots[self._plan.rows]
        pieces = slots.split(self._plan.counts)
        for member in self._plan.members:
            row = self._requests[member].kv.req_pool_idx
            self._table[row, : self._plan.counts[member]] = pieces[member].to(self._table.dtype)
        return slots

    def free_dropped_slots(self, allocator: Any) -> None:  # SGLang's TokenToKVPoolAllocator
        """Frees the slots of dropped tokens after the last layer, and shortens the members' records.

        SGLang appends new tokens at the recorded lengths, and frees that many slots when the request ends.
        """
        dropped = self._plan.dropped
        unused = torch.ones_like(self._slots, dtype=torch.bool).index_fill(0, self._plan.rows, False)
        allocator.free(self._slots[torch.nonzero_static(unused, size=sum(dropped))[:, 0]])
        for member in self._plan.members:
            kv = self._requests[member].kv
            kv.kv_allocated_len -= dropped[member]
            kv.kv_committed_len -= dropped[member]
