# SPDX-License-Identifier: Apache-2.0
"""compact_kv_ and compact_paged_kv_: cache[target(i)] = cache[keep[i]], in place.

target(i) = i, or end - kept + i with ``align_end``.

In-place safety. Sources and targets both ascend with i. A downward move i (target < source) writes to target(i), which
only a move j < i may still have to read; so downward moves are made in ascending order, tile by tile, all loads of a
tile before its stores. A later move reads above its own target, which is above target(i): the next tile may be loaded
before this tile is stored, and one barrier per tile suffices. Upward moves are the mirror image, made in descending
order, and no upward move touches what a downward move reads, or the reverse. Each stream (a block of columns of one
head of K or V of one sequence of one layer) is owned by one program: no two programs share an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...ops import overlap
from ...ops.contract import check
from . import configs
from .configs import config, width_class
from .launch import Launch, Plans, as_words, cdiv, power_of_two, signature


@triton.jit
def _pick(tensors, which):
    """Select a tensor of the tuple by index: one launch covers several layers."""
    chosen = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        chosen = tl.where(which == i, tensors[i], chosen)
    return chosen


@triton.jit
def _address(cache, table, position, valid, blocks, cache_block, cache_slot, PAGE_SIZE: tl.constexpr):
    """Pointers to positions of one head of a sequence, and the mask of those that exist."""
    if PAGE_SIZE == 0:
        at = cache + position * cache_slot
    else:
        block = tl.load(table + position // PAGE_SIZE, mask=valid, other=-1).to(tl.int64)
        at = cache + block * cache_block + position % PAGE_SIZE * cache_slot
        valid = valid & (block >= 0) & (block < blocks)
    return at, valid


@triton.jit
def _fetch(
    cache, table, keep, tile, kept, first, extent, blocks, column, cache_block, cache_slot, cache_column,
    WIDTH: tl.constexpr, DOWN: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of one stream: data, targets, mask; and the mask of valid moves in the other direction."""
    entry = tile * ROWS + tl.arange(0, ROWS)
    source = tl.load(keep + entry, mask=(entry >= 0) & (entry < kept), other=-1)  # [ROWS] int64
    target = first + entry
    valid = (source >= 0) & (source < extent) & (target >= 0) & (target < extent)
    others = valid & ((target > source) if DOWN else (target < source))
    valid = valid & ((target < source) if DOWN else (target > source))
    load_from, there = _address(cache, table, source, valid, blocks, cache_block, cache_slot, PAGE_SIZE)
    store_to, valid = _address(cache, table, target, there, blocks, cache_block, cache_slot, PAGE_SIZE)
    offset = column[None, :] * cache_column
    mask = valid[:, None] & (column < WIDTH)[None, :]  # [ROWS, COLUMNS]
    return tl.load(load_from[:, None] + offset, mask=mask), store_to[:, None] + offset, mask, others


@triton.jit
def _move(
    cache, table, keep, kept, first, extent, blocks, column, cache_block, cache_slot, cache_column,
    WIDTH: tl.constexpr, DOWN: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Make the downward moves of one stream in ascending order, or the upward moves in descending order.

    Loads run one tile ahead of stores. Returns whether there are valid moves in the other direction.
    """
    tiles = tl.cdiv(kept, ROWS)
    start = 0 if DOWN else tiles - 1
    moved, to, mask, others = _fetch(
        cache, table, keep, start, kept, first, extent, blocks, column, cache_block, cache_slot, cache_column,
        WIDTH, DOWN, PAGE_SIZE, ROWS,
    )  # fmt: skip
    for done in range(1, tiles + 1):
        next_moved, next_to, next_mask, more = _fetch(
            cache, table, keep, done if DOWN else start - done, kept, first, extent, blocks, column,
            cache_block, cache_slot, cache_column, WIDTH, DOWN, PAGE_SIZE, ROWS,
        )  # fmt: skip
        tl.debug_barrier()  # this tile's stores may overwrite what another thread loads for this tile
        tl.store(to, moved, mask=mask)
        moved, to, mask = next_moved, next_to, next_mask
        others = others | more
    return tl.max(others.to(tl.int32)) == 1


@triton.jit(do_not_specialize=["layers", "heads", "capacity", "extent", "blocks", "counts_batch", "counts_head"])
def _compact_kernel(
    caches,  # layers * ([B, Hk, L, D], or [blocks, page_size, Hk, D]), padded to a power of two
    keeps,  # layers * [B, K] or [B, Hk, K] int64; one, where all layers share it
    counts,  # layers * [B] or [B, Hk] int32; likewise
    table,  # [B, max_blocks] int32, or None
    lengths,  # [B] int32: where sequences end, or None: at ``extent``
    layers,
    heads,  # Hk
    capacity,  # K
    extent,  # positions run over [0, extent)
    blocks,
    cache_batch,  # strides: of a sequence (dense), ...
    cache_head,
    cache_block,  # ... of a block (paged)
    cache_slot,
    cache_column,
    keep_batch,
    keep_head,
    counts_batch,
    counts_head,
    table_batch,
    lengths_batch,
    WIDTH: tl.constexpr,  # D
    ALIGN_END: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: dense
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per stream: COLUMNS columns of one head of one sequence of one cache."""
    pid = tl.program_id(0)
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    pid = pid // column_tiles
    h = (pid % heads).to(tl.int64)
    pid = pid // heads
    layer = pid % layers
    b = (pid // layers).to(tl.int64)

    kept = tl.load(_pick(counts, layer) + b * counts_batch + h * counts_head)
    kept = tl.minimum(tl.maximum(kept, 0), capacity)
    first = tl.full([], 0, tl.int64)
    if ALIGN_END:
        first += extent if lengths is None else tl.load(lengths + b * lengths_batch)
        first -= kept
    if table is not None:
        table += b * table_batch
    keep = _pick(keeps, layer) + b * keep_batch + h * keep_head
    cache = _pick(caches, layer) + b * cache_batch + h * cache_head

    # All moves have one direction, unless keep holds entries that are skipped.
    others = _move(
        cache, table, keep, kept, first, extent, blocks, column, cache_block, cache_slot, cache_column,
        WIDTH, not ALIGN_END, PAGE_SIZE, ROWS,
    )  # fmt: skip
    if others:
        _move(
            cache, table, keep, kept, first, extent, blocks, column, cache_block, cache_slot, cache_column,
            WIDTH, ALIGN_END, PAGE_SIZE, ROWS,
        )  # fmt: skip


# Maximum number of caches of a launch. Numbers are padded to a power of two, so that few kernels serve all models.
MOST_CACHES = 64

_plans, _paged_plans = Plans(), Plans()


def compact_kv_(
    keys: Sequence[Tensor],  # [B, Hk, L, D] each
    values: Sequence[Tensor],  # [B, Hk, L, D] each
    keep: Sequence[Tensor],  # [B, K] or [B, Hk, K]; one, or one per layer
    counts: Sequence[Tensor],  # [B] or [B, Hk]
    *,
    align_end: bool = False,
) -> None:
    """See ``mustdrop_kernels.compact_kv_``."""
    key = signature(keys, values, keep, counts, align_end)
    tensors = (*keys, *values, *keep, *counts)
    plan = _plans.get(key)
    if plan is None or not plan.layout.disjoint(tensors):
        check("compact_kv_", keys, values, keep, counts, align_end=align_end)
        plan = _plans.add(key, _plan(keys, values, keep, counts, align_end, None, None))
    _run(plan.groups, keys, values, keep, counts, None, None)


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
    key = signature(keys, values, block_table, keep, counts, seq_lens, align_end)
    tensors = (*keys, *values, *keep, *counts, block_table, *([] if seq_lens is None else [seq_lens]))
    plan = _paged_plans.get(key)
    if plan is None or not plan.layout.disjoint(tensors):
        check("compact_paged_kv_", keys, values, block_table, keep, counts, seq_lens=seq_lens, align_end=align_end)
        plan = _paged_plans.add(key, _plan(keys, values, keep, counts, align_end, block_table, seq_lens))
    _run(plan.groups, keys, values, keep, counts, block_table, seq_lens if align_end else None)


class _Plan(NamedTuple):
    groups: list[tuple[Launch, list[int], list[int]]]
    layout: overlap.Layout
    """Overlap check of addresses, which are not part of the signature: run in every call."""


def _parts(cache: Tensor) -> list[Tensor]:
    """The cache as one 4-D tensor of a dtype that Triton can move, or two for 16-byte elements."""
    words = as_words(cache)
    return [words] if words.dim() == 4 else [words[..., 0], words[..., 1]]


def _run(
    groups: list[tuple[Launch, list[int], list[int]]],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    table: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if not groups:
        return
    caches = [part for cache in (*keys, *values) for part in _parts(cache)]
    for launch, members, shared in groups:
        launch(
            tuple(caches[i] for i in members),
            tuple(keep[i] for i in shared),
            tuple(counts[i] for i in shared),
            table,
            lengths,
        )


def _plan(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    align_end: bool,
    table: Tensor | None,
    seq_lens: Tensor | None,
) -> _Plan:
    """Launches, each with the indices of its caches (padded to a power of two) and of its keep sets.

    Caches of one launch agree in shape, strides and dtype, as a model's layers do unless they were compacted before.
    """
    parts = [(i % len(keys), part) for i, cache in enumerate((*keys, *values)) for part in _parts(cache)]
    by_signature: dict[object, list[int]] = {}
    for number, (layer, part) in enumerate(parts):
        if part.numel() == 0:
            continue
        own = layer if len(keep) > 1 else 0
        by_signature.setdefault(signature(part, keep[own], counts[own]), []).append(number)

    groups = []
    for same in by_signature.values():
        for begin in range(0, len(same), MOST_CACHES):
            members = same[begin : begin + MOST_CACHES]
            layers = len(members)
            members += members[-1:] * (power_of_two(layers) - layers)
            shared = [parts[i][0] for i in members] if len(keep) > 1 else [0]
            cache = parts[members[0]][1]
            launch = _launch(cache, keep[shared[0]], counts[shared[0]], layers, align_end, table, seq_lens)
            groups.append((launch, members, shared))
    written = [("cache", cache, True) for cache in (*keys, *values)]
    read = [("read", t, False) for t in (*keep, *counts, table, seq_lens) if t is not None]
    return _Plan(groups, overlap.Layout([*written, *read]))


def _launch(
    cache: Tensor,
    keep: Tensor,
    counts: Tensor,
    layers: int,
    align_end: bool,
    table: Tensor | None,
    seq_lens: Tensor | None,
) -> Launch:
    keep_head, counts_head = (keep.stride(1), counts.stride(1)) if keep.dim() == 3 else (0, 0)
    if table is None:
        batch, heads, extent, width = cache.shape
        cache_batch, cache_head, cache_slot, cache_column = cache.stride()
        blocks, cache_block, page_size = 0, 0, 0
    else:
        blocks, page_size, heads, width = cache.shape
        cache_block, cache_slot, cache_head, cache_column = cache.stride()
        batch, extent, cache_batch = table.shape[0], table.shape[1] * page_size, 0
    chosen = config("compact", width_class(width), cache.device)
    streams = batch * layers * heads
    columns = power_of_two(width, 1, chosen.COLUMNS)
    # With too few streams to fill the device, narrow them, down to two sectors of 32 bytes.
    while streams * cdiv(width, columns) < 2 * configs.processors(cache.device) and columns * cache.element_size() > 64:
        columns //= 2
    programs = streams * cdiv(width, columns)
    return Launch(
        _compact_kernel,
        (programs if keep.shape[-1] else 0,),
        (
            layers, heads, keep.shape[-1], extent, blocks,
            cache_batch, cache_head, cache_block, cache_slot, cache_column,
            keep.stride(0), keep_head, counts.stride(0), counts_head,
            0 if table is None else table.stride(0), 0 if seq_lens is None else seq_lens.stride(0),
            width, align_end, page_size, chosen.ROWS, columns,
        ),
        chosen,
    )  # fmt: skip
