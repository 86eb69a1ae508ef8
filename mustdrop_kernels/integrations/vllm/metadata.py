# SPDX-License-Identifier: Apache-2.0
"""Where tokens are in vLLM's paged cache on a CPU.

A request that has lost d tokens keeps the rest in blocks d // slots, d // slots + 1, ... of its table, from the first
slot of the first of them on. So it reads and writes like any request of its shorter length, through the table without
the blocks before: no attention kernel knows of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops, envs

from ...plans import skip_leading_blocks

READABLE = ("vec", "vec16")
"""Layouts of the CPU attention whose keys can be viewed as (blocks, slots, heads, D)."""


class Pages(NamedTuple):
    """What a layer needs to know of a step."""

    metadata: Any
    slots: Tensor  # (rows) int64, where each row's key and value go


def cache_views(cache: Tensor) -> tuple[Tensor, Tensor]:  # (blocks, Hk, slots, 2 D)
    """Keys and values as (blocks, slots, Hk, D). Keys are stored transposed, as (blocks, Hk, D, slots)."""
    blocks, heads, slots, width = cache.shape
    halves = cache.view(blocks, heads, 2, slots * width // 2)
    keys = halves[:, :, 0].unflatten(-1, (width // 2, slots)).permute(0, 3, 1, 2)
    values = halves[:, :, 1].unflatten(-1, (slots, width // 2)).permute(0, 2, 1, 3)
    return keys, values


class Paging:
    """Makes the attention metadata of steps in which requests hold fewer tokens than vLLM thinks."""

    def __init__(self, attention: Any) -> None:  # any attention layer of the language model
        self.attention = attention

    def check(self) -> None:
        """Refuses layouts of the cache that ``cache_views`` does not know."""
        if self.attention.isa not in READABLE:
            raise ValueError(
                f"mustdrop: the CPU attention's {self.attention.isa!r} cache is not served, which vLLM takes for "
                "bfloat16 on a processor with matrix tiles; dtype float16 or float32 has another"
            )

    @property
    def block_slots(self) -> int:
        """Slots of a block."""
        return self.attention.kv_cache.shape[2]

    def lay_out(self, plain: Any, new: Sequence[int], lengths: Sequence[int], lost: Sequence[int]) -> Pages:
        """Pages of a step with new[b] rows of request b, whose sequence is lengths[b] long after `lost` tokens went."""
        device, slots = plain.seq_lens.device, self.block_slots
        rows, length, gone = (torch.tensor(x, device=device) for x in (new, lengths, lost))
        begins = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
        table = skip_leading_blocks(plain.block_table[: len(new)], gone // slots)
        request = torch.repeat_interleave(rows)
        place = torch.arange(request.shape[0], device=device) + (length - rows - begins[:-1])[request]
        metadata = self._metadata(plain, begins.to(plain.query_start_loc.dtype), length.to(plain.seq_lens.dtype), table)
        target = table[request, place // slots].long() * slots + place % slots
        return Pages(dataclasses.replace(metadata, slot_mapping=target), target)

    def _metadata(self, plain: Any, begins: Tensor, lengths: Tensor, table: Tensor) -> Any:
        layer = self.attention
        plan = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lengths.shape[0],
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            seq_lens=lengths,
            dtype=layer.kv_cache.dtype,
            query_start_loc=begins,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
        return dataclasses.replace(
            plain,
            num_actual_tokens=int(begins[-1]),
            max_query_len=int((begins[1:] - begins[:-1]).max()),
            query_start_loc=begins,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=table,
            scheduler_metadata=plan,
        )


class Turner:
    """Turns the pages that the layers read from; puts vLLM's own back."""

    def __init__(self, context: Any, layers: Sequence[str]) -> None:
        self._context, self._layers = context, layers

    def to(self, pages: Pages) -> None:
        """All layers read and write these from here on."""
        for name in self._layers:
            self._context.attn_metadata[name] = pages.metadata
            self._context.slot_mapping[name] = pages.slots


@contextlib.contextmanager
def turning(context: Any, layers: Sequence[str]) -> Iterator[Turner]:
    """Within it a step's pages can be turned."""
    plain = [(context.attn_metadata[name], context.slot_mapping[name]) for name in layers]
    try:
        yield Turner(context, layers)
    finally:
        for name, (metadata, slots) in zip(layers, plain, strict=True):
            context.attn_metadata[name], context.slot_mapping[name] = metadata, slots
