# SPDX-License-Identifier: Apache-2.0
"""Attention metadata of requests that have lost tokens, for vLLM's CPU attention.

A request that has lost d tokens keeps the others in blocks d // block_size, d // block_size + 1, ... of its table, from
the first slot on. Through the table without the leading blocks it is an ordinary request of its shorter length, so
attention kernels need no change.
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
"""Cache layouts of the CPU attention whose keys can be viewed as (blocks, block_size, heads, D)."""


class StepMetadata(NamedTuple):
    """Inputs of a step's attention layers."""

    metadata: Any
    slot_mapping: Tensor  # (rows) int64, the slot of each row's key and value


def cache_views(cache: Tensor) -> tuple[Tensor, Tensor]:  # (blocks, Hk, block_size, 2 D)
    """Keys and values as (blocks, block_size, Hk, D). Keys are stored transposed, as (blocks, Hk, D, block_size)."""
    blocks, heads, block_size, width = cache.shape
    halves = cache.view(blocks, heads, 2, block_size * width // 2)
    keys = halves[:, :, 0].unflatten(-1, (width // 2, block_size)).permute(0, 3, 1, 2)
    values = halves[:, :, 1].unflatten(-1, (block_size, width // 2)).permute(0, 2, 1, 3)
    return keys, values


class MetadataBuilder:
    """Builds the attention metadata of steps whose requests hold fewer tokens than in vLLM's own metadata."""

    def __init__(self, attention: Any) -> None:  # any attention layer of the language model
        self.attention = attention

    def check(self) -> None:
        """Raises ``ValueError`` for cache layouts that ``cache_views`` cannot read."""
        if self.attention.isa not in READABLE:
            raise ValueError(
                f"mustdrop: the CPU attention's {self.attention.isa!r} cache is not served, which vLLM takes for "
                "bfloat16 on a processor with matrix tiles; dtype float16 or float32 has another"
            )

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return self.attention.kv_cache.shape[2]

    def build(
        self,
        plain: Any,  # vLLM's own metadata of the step
        new: Sequence[int],  # rows of each request
        lengths: Sequence[int],  # length of each sequence without its dropped tokens
        skipped: Sequence[int],  # dropped tokens of each request whose leading blocks are skipped
    ) -> StepMetadata:
        """Metadata of the remaining rows and cached tokens of a step."""
        device, block_size = plain.seq_lens.device, self.block_size
        rows, length, lost = (torch.tensor(x, device=device) for x in (new, lengths, skipped))
        begins = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
        table = skip_leading_blocks(plain.block_table[: len(new)], lost // block_size)
        request = torch.repeat_interleave(rows)
        place = torch.arange(request.shape[0], device=device) + (length - rows - begins[:-1])[request]
        metadata = self._metadata(plain, begins.to(plain.query_start_loc.dtype), length.to(plain.seq_lens.dtype), table)
        slot_mapping = table[request, place // block_size].long() * block_size + place % block_size
        return StepMetadata(dataclasses.replace(metadata, slot_mapping=slot_mapping), slot_mapping)

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


class MetadataSwap:
    """Replaces the metadata of a forward context for the given layers."""

    def __init__(self, context: Any, layers: Sequence[str]) -> None:
        self._context, self._layers = context, layers

    def use(self, step: StepMetadata) -> None:
        """Sets the metadata of all layers."""
        for name in self._layers:
            self._context.attn_metadata[name] = step.metadata
            self._context.slot_mapping[name] = step.slot_mapping


@contextlib.contextmanager
def metadata_swap(context: Any, layers: Sequence[str]) -> Iterator[MetadataSwap]:
    """A ``MetadataSwap`` whose changes end with the block."""
    plain = [(context.attn_metadata[name], context.slot_mapping[name]) for name in layers]
    try:
        yield MetadataSwap(context, layers)
    finally:
        for name, (metadata, slot_mapping) in zip(layers, plain, strict=True):
            context.attn_metadata[name], context.slot_mapping[name] = metadata, slot_mapping
