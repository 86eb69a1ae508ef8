# SPDX-License-Identifier: Apache-2.0
"""Cutting KV caches down to the kept tokens, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(cache: Tensor) -> Tensor:
    """The same memory as integers: moving tokens moves bytes, whatever they mean."""
    same_size = _SAME_SIZE.get(cache.element_size())
    return cache if same_size is None else cache.view(same_size)


def _moves(
    keep: Tensor,  # [B, K] or [B, Hk, K]
    counts: Tensor,  # [B] or [B, Hk]
    heads: int,
    length: int | Tensor,  # [B]: where align_end ends
    extent: int,  # positions run over [0, extent)
    align_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Source and destination position of each move, and whether it is one: each [B, Hk, K]."""
    if keep.dim() == 2:
        keep, counts = keep[:, None].expand(-1, heads, -1), counts[:, None].expand(-1, heads)
    kept = counts.long().clamp(0, keep.shape[-1])[..., None]
    entry = torch.arange(keep.shape[-1], device=keep.device).expand_as(keep)
    end = length.long()[:, None, None] if isinstance(length, Tensor) else length
    target = end - kept + entry if align_end else entry
    valid = (entry < kept) & (keep >= 0) & (keep < extent) & (target >= 0) & (target < extent)
    return keep, target, valid


def compact_kv_(
    keys: Sequence[Tensor],  # [B, Hk, L, D] each
    values: Sequence[Tensor],  # [B, Hk, L, D] each
    keep: Sequence[Tensor],  # [B, K] or [B, Hk, K]; one, or one per layer
    counts: Sequence[Tensor],  # [B] or [B, Hk]
    *,
    align_end: bool = False,
) -> None:
    """See ``mustdrop_kernels.compact_kv_``."""
    checks.compact_kv_(keys, values, keep, counts, align_end=align_end)
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        shared = layer if len(keep) > 1 else 0
        _, heads, length, _ = pair[0].shape
        source, target, valid = _moves(keep[shared], counts[shared], heads, length, length, align_end)
        b, h, i = valid.nonzero(as_tuple=True)
        for cache in pair:
            cache = _bits(cache)
            cache[b, h, target[b, h, i]] = cache[b, h, source[b, h, i]]


def compact_paged_kv_(
    keys: Sequence[Tensor],  # [blocks, slots, Hk, D] each
    values: Sequence[Tensor],  # [blocks, slots, Hk, D] each
    block_table: Tensor,  # [B, max_blocks]
    keep: Sequence[Tensor],  # [B, K] or [B, Hk, K]; one, or one per layer
    counts: Sequence[Tensor],  # [B] or [B, Hk]
    *,
    seq_lens: Tensor | None = None,  # [B]
    align_end: bool = False,
) -> None:
    """See ``mustdrop_kernels.compact_paged_kv_``."""
    checks.compact_paged_kv_(keys, values, block_table, keep, counts, seq_lens=seq_lens, align_end=align_end)
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        shared = layer if len(keep) > 1 else 0
        blocks, slots, heads, _ = pair[0].shape
        end = seq_lens if seq_lens is not None else 0
        extent = block_table.shape[1] * slots
        source, target, valid = _moves(keep[shared], counts[shared], heads, end, extent, align_end)
        b, h, i = valid.nonzero(as_tuple=True)
        source, target = source[b, h, i], target[b, h, i]
        from_block, to_block = block_table[b, source // slots].long(), block_table[b, target // slots].long()
        real = (from_block >= 0) & (from_block < blocks) & (to_block >= 0) & (to_block < blocks)
        from_slot, to_slot = (source % slots)[real], (target % slots)[real]
        for cache in pair:
            cache = _bits(cache)
            cache[to_block[real], to_slot, h[real]] = cache[from_block[real], from_slot, h[real]]
