# SPDX-License-Identifier: Apache-2.0
"""The cache of requests that have lost tokens, as attention kernels see it.

A request that has lost d tokens keeps the others in blocks d // block_size, d // block_size + 1, ... of its table, from
the first slot on. Through the table without the leading blocks it is an ordinary request of its shorter length, so
attention kernels need no change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...plans import PackedDropPlan, skip_leading_blocks
from .step import Step


def slot_mapping(block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, rows: int, block_size: int) -> Tensor:
    """(rows) int64: the slots of the new tokens of R requests, the last ones of each in the cache.

    ``query_start_loc`` (R + 1) holds the first row of each request and, at last, the number of rows.
    """
    request = torch.repeat_interleave(query_start_loc.diff(), output_size=rows)
    place = torch.arange(rows, device=block_table.device) + (seq_lens - query_start_loc[1:])[request]
    return block_table[request, place // block_size].long() * block_size + place % block_size


def without_lost(block_table: Tensor, seq_lens: Tensor, lost: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Block tables (R, max_blocks) and lengths (R) of requests that have lost these numbers of tokens."""
    return skip_leading_blocks(block_table, lost // block_size), seq_lens - lost


def remaining_rows(step: Step, plan: PackedDropPlan, block_size: int) -> CommonAttentionMetadata:
    """The remaining rows and cached tokens of a step.

    Before the last drop the remaining tokens of a prompt are in its first blocks. After it they are in their final
    place, with the leading blocks empty.
    """
    if plan.final:
        table, seq_lens = without_lost(step.block_table, step.seq_lens, plan.lost, block_size)
    else:
        table, seq_lens = step.block_table, step.seq_lens - plan.lost
    lengths = [length - dropped for length, dropped in zip(step.lengths, plan.dropped, strict=True)]
    return common_metadata(plan.counts, plan.live_counts, lengths, seq_lens, table, block_size)


def common_metadata(
    counts: Sequence[int],  # rows of each of R requests
    new: Tensor,  # (R) int64, the same
    lengths: Sequence[int],  # cached tokens of each request after the step, at most
    seq_lens: Tensor,  # (R) the same, exactly
    block_table: Tensor,  # (R, max_blocks) int32
    block_size: int,
) -> CommonAttentionMetadata:
    """vLLM's description of a step, from which each attention backend builds its own."""
    rows, length = torch.tensor(counts, device="cpu"), torch.tensor(lengths, dtype=torch.int32, device="cpu")
    total, begins, seq_lens = sum(counts), _begins(new), seq_lens.int()
    return CommonAttentionMetadata(
        query_start_loc=begins,
        query_start_loc_cpu=_begins(rows),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=length,
        num_reqs=len(counts),
        num_actual_tokens=total,
        max_query_len=max(counts),
        max_seq_len=max(lengths),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping(block_table, seq_lens, begins, total, block_size),
        causal=True,
    )


def _begins(new: Tensor) -> Tensor:  # (R) -> (R + 1) int32
    return torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()


class MetadataSwap:
    """Replaces the attention metadata of a forward context for the given layers."""

    def __init__(self, context: Any, layers: Sequence[str]) -> None:
        self._context, self._layers = context, layers

    def use(self, metadata: dict[str, Any], slots: Tensor) -> None:
        """Sets the metadata of each layer, and the slot mapping of all."""
        for name in self._layers:
            self._context.attn_metadata[name] = metadata[name]
            self._context.slot_mapping[name] = slots


@contextlib.contextmanager
def metadata_swap(context: Any, layers: Sequence[str]) -> Iterator[MetadataSwap]:
    """A ``MetadataSwap`` whose changes end with the block."""
    plain = [(context.attn_metadata[name], context.slot_mapping[name]) for name in layers]
    try:
        yield MetadataSwap(context, layers)
    finally:
        for name, (metadata, slots) in zip(layers, plain, strict=True):
            context.attn_metadata[name], context.slot_mapping[name] = metadata, slots
