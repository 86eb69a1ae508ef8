# SPDX-License-Identifier: Apache-2.0
"""In-place compaction of KV caches to the kept tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bits import as_integers


def _moves(
    keep: Tensor,  # [B, K] or [B, Hk, K]
    counts: Tensor,  # [B] or [B, Hk]
    heads: int,
    length: int | Tensor,  # [B]: where align_end ends
    extent: int,  # positions run over [0, extent)
    align_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Source and destination position of each move, and its validity: [B, Hk, K] each."""
    if keep.dim() == 2:
        keep, counts = keep[:, None].expand(-1, heads, -1), counts[:, None].expand(-1, heads)
    kept = counts.long().clamp(0, keep.shape[-1])[..., None]
    entry = torch.arange(keep.shape[-1], device=keep.device).expand_as(keep)
    end = length.long()[:, None, None] if isinstance(length, Tensor) else length
    target = end - kept + entry if align_end else entry
    valid = (entry < kept) & (keep >= 0) & (keep < extent) & (target >= 0) & (target < extent)
    return keep, target, valid


def _origin(
    source: Tensor,  # [..., K]
    target: Tensor,  # [..., K]
    valid: Tensor,  # [..., K] bool
    slots: int,
) -> Tensor:  # [..., slots] int64
    """Source slot of each slot: itself, unless a move targets it."""
    origin = torch.arange(slots + 1, device=source.device).repeat(*source.shape[:-1], 1)
    nowhere = slots  # target of invalid moves
    return origin.scatter_(-1, target.where(valid, nowhere), source.where(valid, nowhere))[..., :slots]


def _physical(
    position: Tensor,  # [B, Hk, K]
    block_table: Tensor,  # [B, max_blocks]
    blocks: int,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Slot of each position in the flattened cache, and whether it exists: [B, Hk, K] each."""
    if block_table.shape[1] == 0:
        return position, torch.zeros_like(position, dtype=torch.bool)
    column = (position // max(page_size, 1)).clamp(0, block_table.shape[1] - 1)
    block = block_table.long().gather(1, column.flatten(1)).view_as(column)
    return block * page_size + position % max(page_size, 1), (block >= 0) & (block < blocks)


def compact_kv_(
    keys: Sequence[Tensor],  # [B, Hk, L, D] each
    values: Sequence[Tensor],  # [B, Hk, L, D] each
    keep: Sequence[Tensor],  # [B, K] or [B, Hk, K]; one, or one per layer
    counts: Sequence[Tensor],  # [B] or [B, Hk]
    *,
    align_end: bool = False,
) -> None:
    """See ``mustdrop_kernels.compact_kv_``."""
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        shared = layer if len(keep) > 1 else 0
        _, heads, length, _ = pair[0].shape
        source, target, valid = _moves(keep[shared], counts[shared], heads, length, length, align_end)
        origin = _origin(source, target, valid, length)
        for cache in pair:
            cache = as_integers(cache)
            cache.copy_(cache.gather(2, origin[..., None].expand_as(cache)))


def compact_paged_kv_(
    keys: Sequence[Tensor],  # [blocks, page_size, Hk, D] each
    values: Sequence[Tensor],  # [blocks, page_size, Hk, D] each
    block_table: Tensor,  # [B, max_blocks]
    keep: Sequence[Tensor],  # [B, K] or [B, Hk, K]; one, or one per layer
    counts: Sequence[Tensor],  # [B] or [B, Hk]
    *,
    seq_lens: Tensor | None = None,  # [B]
    align_end: bool = False,
) -> None:
    """See ``mustdrop_kernels.compact_paged_kv_``."""
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        shared = layer if len(keep) > 1 else 0
        blocks, page_size, heads, _ = pair[0].shape
        end = seq_lens if seq_lens is not None else 0
        extent = block_table.shape[1] * page_size
        source, target, valid = _moves(keep[shared], counts[shared], heads, end, extent, align_end)
        from_slot, from_real = _physical(source, block_table, blocks, page_size)
        to_slot, to_real = _physical(target, block_table, blocks, page_size)
        real = valid & from_real & to_real
        source, target, valid = (x.transpose(0, 1).flatten(1) for x in (from_slot, to_slot, real))  # [Hk, B K]
        origin = _origin(source, target, valid, blocks * page_size).T.reshape(blocks, page_size, heads)
        for cache in pair:
            cache = as_integers(cache)
            cache.copy_(cache[origin // page_size, origin % page_size, torch.arange(heads, device=cache.device)])
