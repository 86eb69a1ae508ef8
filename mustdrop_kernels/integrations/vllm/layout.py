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


def slot_mapping(block_table: Tensor, seq_lens: Tensor, new: Tensor, rows: int, block_size: int) -> Tensor:
    """(rows) int64: the slots of the last `new` tokens of each of R requests, all of which are `rows`."""
    request = torch.repeat_interleave(new, output_size=rows)
    begins = new.cumsum(0) - new
    place = torch.arange(rows, device=new.device) + (seq_lens - new - begins)[request]
    return block_table[request, place // block_size].long() * block_size + place % block_size


def remaining_rows(step: Step, plan: PackedDropPlan, block_size: int) -> CommonAttentionMetadata:
    """The remaining rows and cached tokens of a step.

    Before the last drop the remaining tokens of a prompt are in its first blocks. After it they are in their final
    place, with the leading blocks empty.
    """
    table, lost = step.block_table, plan.lost
    if plan.final:
        table = skip_leading_blocks(table, lost // block_size)
    new, seq_lens = plan.live_counts, step.seq_lens - lost
    lengths = [length - dropped for length, dropped in zip(step.lengths, plan.dropped, strict=True)]
    return common_metadata(plan.counts, new, lengths, seq_lens, table, block_size)


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
    total, seq_lens = sum(counts), seq_lens.int()
    return CommonAttentionMetadata(
        query_start_loc=_begins(new),
        query_start_loc_cpu=_begins(rows),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=length,
        num_reqs=len(counts),
        num_actual_tokens=total,
        max_query_len=max(counts),
        max_seq_len=max(lengths),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping(block_table, seq_lens, new, total, block_size),
        causal=True,
    )


def _begins(new: Tensor) -> Tensor:  # (R) -> (R + 1) int32
    return torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()


class MetadataSwap:
    """Replaces the attention metadata of a forward context for the given layers."""

    def __init__(self, context: Any, layers: Sequence[str]) -> None:
        self._context, self._layers = context, layers

    def use(self, metadata: Any, slots: Tensor) -> None:
        """Sets the metadata and the slot mapping of all layers."""
        for name in self._layers:
            self._context.attn_metadata[name] = metadata
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
