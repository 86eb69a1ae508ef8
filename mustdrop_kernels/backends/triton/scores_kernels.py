# SPDX-License-Identifier: Apache-2.0
"""Kernels of text_vision_scores and its variants; see scores.py for the formulas and the order of launches."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import dot
from .token_types import is_query, is_token, is_vision

# Output of the first kernel for a sequence, int32: begin in packed q, begin in packed k, position of row 0,
# number of keys, number of query rows; then, from HEADER on, the query rows themselves.
HEADER = 8
_HEADER = tl.constexpr(HEADER)


@triton.jit
def _span(cu_seqlens, b, total, longest):
    """Begin and length of a packed sequence, clamped to the tensor."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), 0), total)
    return begin, tl.minimum(tl.maximum(end - begin, 0), longest)


@triton.jit
def _kinds(types, table, position, inside, blocks, PAGE_SIZE: tl.constexpr):
    """Token types at positions of a sequence; padding outside it and in blocks that do not exist."""
    kind = tl.load(types + position, mask=inside, other=0)
    if PAGE_SIZE > 0:
        block = tl.load(table + position // PAGE_SIZE, mask=inside, other=-1)
        kind = tl.where((block >= 0) & (block < blocks), kind, 0)
    return kind


@triton.jit
def _key_offsets(table, position, exists, k_begin, k_block, k_token, PAGE_SIZE: tl.constexpr):
    """int64 offsets of the keys at positions of a sequence."""
    if PAGE_SIZE == 0:
        offset = (k_begin + position).to(tl.int64) * k_token
    else:
        block = tl.load(table + position // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        offset = block * k_block + (position % PAGE_SIZE).to(tl.int64) * k_token
    return offset


@triton.jit(do_not_specialize=["q_total", "q_longest", "k_total", "k_longest", "blocks", "table_batch"])
def rows_kernel(
    types,  # [B, Lk] or [total_k] uint8
    cu_seqlens_q,  # [B+1] int32, or None: dense
    cu_seqlens_k,  # [B+1] int32, or None: not packed
    seq_lens,  # [B] int32, or None: not paged
    table,  # [B, max_blocks] int32, or None: not paged
    info,  # [B, HEADER + q_longest] int32
    q_total,
    q_longest,
    k_total,
    k_longest,
    blocks,
    types_batch,
    table_batch,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence: its geometry and its query rows, in order."""
    b = tl.program_id(0).to(tl.int64)
    q_begin, q_length, k_begin, k_length = 0, q_longest, 0, k_longest
    if cu_seqlens_q is not None:
        q_begin, q_length = _span(cu_seqlens_q, b, q_total, q_longest)
    if cu_seqlens_k is not None:
        k_begin, k_length = _span(cu_seqlens_k, b, k_total, k_longest)
    if seq_lens is not None:
        k_length = tl.minimum(tl.maximum(tl.load(seq_lens + b), 0), k_longest)
    if table is not None:
        table += b * table_batch
    shift = k_length - q_length
    info += b * (_HEADER + q_longest)
    number = 0
    for start in range(0, q_length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (i < q_length) & (shift + i >= 0)
        kind = _kinds(types + b * types_batch + k_begin, table, shift + i, inside, blocks, PAGE_SIZE)
        queries = is_query(kind).to(tl.int32)
        tl.store(info + _HEADER + number + tl.cumsum(queries) - queries, i, mask=queries == 1)
        number += tl.sum(queries)
    tl.store(info, q_begin)
    tl.store(info + 1, k_begin)
    tl.store(info + 2, shift)
    tl.store(info + 3, k_length)
    tl.store(info + 4, number)


@triton.jit(do_not_specialize=["q_longest", "blocks", "table_batch"])
def lse_kernel(
    q,  # [B, Hq, Lq, D] or [total_q, Hq, D]
    k,  # [B, Hk, Lk, D] or [total_k, Hk, D] or [blocks, page_size, Hk, D]
    types,
    table,
    info,
    norms,  # [B, Hq, q_longest, 2] float32, by index of query row: the highest score, before it is scaled, and log2 of
    # the sum of 2^((score - highest) scale)
    scale,  # times log2(e)
    q_longest,
    blocks,
    q_batch, q_head, q_token,
    k_batch, k_head, k_block, k_token, k_column,
    types_batch, table_batch,
    HEADS: tl.constexpr,  # Hk
    GROUP: tl.constexpr,  # Hq / Hk
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per tile of lines of one key head; a line is a query row in one of the key head's query heads."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    hk = (pid // SPLITS % HEADS).to(tl.int64)
    b = (pid // SPLITS // HEADS).to(tl.int64)
    info += b * (_HEADER + q_longest)
    q_begin, k_begin, shift = tl.load(info), tl.load(info + 1), tl.load(info + 2)
    k_length, lines = tl.load(info + 3), tl.load(info + 4) * GROUP
    types += b * types_batch + k_begin
    if table is not None:
        table += b * table_batch
    q += b * q_batch
    k += b * k_batch + hk * k_head

    for start in range(split * ROWS, lines, SPLITS * ROWS):
        line = start + tl.arange(0, ROWS)
        there = line < lines
        row = line // GROUP
        i = tl.load(info + _HEADER + row, mask=there, other=0)
        position = tl.where(there, shift + i, -1)
        h = hk * GROUP + line % GROUP
        q_at = q + h * q_head + (q_begin + i).to(tl.int64) * q_token  # [ROWS]
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        for first in range(0, tl.minimum(k_length, tl.max(position) + 1), KEYS):
            column = first + tl.arange(0, KEYS)
            exists = is_token(_kinds(types, table, column, column < k_length, blocks, PAGE_SIZE))
            k_at = k + _key_offsets(table, column, exists, k_begin, k_block, k_token, PAGE_SIZE)  # [KEYS]
            score = tl.zeros([ROWS, KEYS], tl.float32)
            for part in range(0, D, COLUMNS):
                d = part + tl.arange(0, COLUMNS)
                query = tl.load(q_at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
                key = tl.load(
                    k_at[None, :] + (d.to(tl.int64) * k_column)[:, None],
                    mask=exists[None, :] & (d < D)[:, None],
                    other=0.0,
                )
                score = dot(query, key, score)
            visible = exists[None, :] & (column[None, :] <= position[:, None])
            score = tl.where(visible, _signed(score, scale), float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # no visible key so far
            share = tl.where(visible, tl.exp2((score - base[:, None]) * tl.abs(scale)), 0.0)
            before = tl.where(top == float("-inf"), 0.0, tl.exp2((top - base) * tl.abs(scale)))
            mass = mass * before + tl.sum(share, axis=1)
            top = higher
        at = norms + 2 * ((b * (HEADS * GROUP) + h) * q_longest + row)
        tl.store(at, top, mask=there)
        tl.store(at + 1, tl.where(mass == 0.0, float("-inf"), tl.log2(mass)), mask=there)


@triton.jit
def _signed(score, scale):
    """The score with the sign of its product with scale. A difference of scores is exact near the highest, whatever
    their size; one of rounded products is not where the compiler fuses product and difference."""
    return tl.where(scale < 0.0, -score, score)


@triton.jit
def _normalizer(lse, norms, b, h, i, r, there, q_begin, q_longest, lse_batch, lse_head, lse_row, HEADS: tl.constexpr):
    """top and norm of some rows of one head: a score weighs 2^((score - top) scale - norm). -inf: no visible key."""
    if lse is not None:
        at = lse + b * lse_batch + h * lse_head + (q_begin + i).to(tl.int64) * lse_row
        norm = tl.load(at, mask=there, other=float("-inf")) * 1.4426950408889634  # log2(e)
        top = tl.zeros_like(norm)
    else:
        at = norms + 2 * ((b * HEADS + h) * q_longest + r)
        top = tl.load(at, mask=there, other=0.0)
        norm = tl.load(at + 1, mask=there, other=float("-inf"))
    return top, norm


@triton.jit
def _head_sum(
    q, k, lse, table, rows, norms, scale, column, vision, k_begin, q_begin, shift, start, number, b, q_longest,
    q_head, q_token, k_head, k_block, k_token, k_column, lse_batch, lse_head, lse_row, head_begin, head_end,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[KEYS, ROWS]: sum over key heads [head_begin, head_end) of the probabilities of query rows from ``start`` on."""
    r = start + tl.arange(0, ROWS)
    there = r < number
    i = tl.load(rows + r, mask=there, other=0)
    position = tl.where(there, shift + i, -1)
    visible = vision[:, None] & (column[:, None] <= position[None, :])
    k_at = k + _key_offsets(table, column, vision, k_begin, k_block, k_token, PAGE_SIZE)  # [KEYS]
    q_at = q + (q_begin + i).to(tl.int64) * q_token  # [ROWS]
    acc = tl.zeros([KEYS, ROWS], tl.float32)
    # Rows ascend: if the last one precedes the tile, no key is visible.
    head_end = tl.where(tl.max(position) >= tl.min(column), head_end, head_begin)
    for key_head in range(head_begin, head_end):
        hk = tl.full([], key_head, tl.int64)
        for g in range(0, GROUP):
            h = hk * GROUP + g
            score = tl.zeros([KEYS, ROWS], tl.float32)
            for part in range(0, D, COLUMNS):
                d = part + tl.arange(0, COLUMNS)
                key = tl.load(
                    k_at[:, None] + (hk * k_head + d.to(tl.int64) * k_column)[None, :],
                    mask=vision[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                query = tl.load(
                    q_at[None, :] + (h * q_head + d)[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0
                )
                score = dot(key, query, score)
            top, norm = _normalizer(
                lse, norms, b, h, i, r, there, q_begin, q_longest, lse_batch, lse_head, lse_row, HEADS * GROUP
            )
            seen = visible & (norm != float("-inf"))[None, :]
            above = (_signed(score, scale) - top[None, :]) * tl.abs(scale)
            acc += tl.where(seen, tl.exp2(above - norm[None, :]), 0.0)
    return acc


@triton.jit(do_not_specialize=["q_longest", "k_longest", "blocks", "table_batch", "lse_row"])
def scores_kernel(
    q,  # [B, Hq, Lq, D] or [total_q, Hq, D]
    k,  # [B, Hk, Lk, D] or [total_k, Hk, D] or [blocks, page_size, Hk, D]
    types,
    lse,  # [B, Hq, Lq] or [Hq, total_q] float32, or None: norms
    table,
    info,
    norms,  # [B, Hq, q_longest, 2] float32, or None: lse
    total,  # [B, Lk] or [total_k] float32
    peak,
    shares,  # SPLITS > 1: [B, SPLITS, k_longest, SHARED] float32, sums over the heads of a split
    tails,  # SPLITS > 1: [B, SPLITS, 2, k_longest] float32, total and peak over the rows past SHARED
    scale,  # times log2(e)
    q_longest,
    k_longest,
    blocks,
    q_batch, q_head, q_token,
    k_batch, k_head, k_block, k_token, k_column,
    types_batch, table_batch, out_batch,
    lse_batch, lse_head, lse_row,
    HEADS: tl.constexpr,  # Hk
    GROUP: tl.constexpr,  # Hq / Hk
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys and split: all heads (SPLITS = 1), or a share of them."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(k_longest, KEYS)
    column = pid % tiles * KEYS + tl.arange(0, KEYS)
    pid = pid // tiles
    split = pid % SPLITS
    b = (pid // SPLITS).to(tl.int64)
    info += b * (_HEADER + q_longest)
    q_begin, k_begin, shift = tl.load(info), tl.load(info + 1), tl.load(info + 2)
    k_length, number = tl.load(info + 3), tl.load(info + 4)
    if table is not None:
        table += b * table_batch
    kind = _kinds(types + b * types_batch + k_begin, table, column, column < k_length, blocks, PAGE_SIZE)
    vision = is_vision(kind)
    number = tl.where(tl.max(vision.to(tl.int32)) == 1, number, 0)  # no vision token: nothing to do
    q += b * q_batch
    k += b * k_batch
    share = 1.0 / (HEADS * GROUP)

    # With SPLITS > 1 all programs of this tile process the first SHARED rows, each for its heads; the following tiles
    # of rows are processed by one program each, for all heads.
    shared = tl.cdiv(tl.minimum(number, SHARED), ROWS) if SPLITS > 1 else 0
    own = SHARED + split * ROWS if SPLITS > 1 else 0
    steps = shared + tl.cdiv(tl.maximum(number - own, 0), SPLITS * ROWS)
    sums = tl.zeros([KEYS], tl.float32)
    tops = tl.zeros([KEYS], tl.float32)
    for step in range(0, steps):
        start, head_begin, head_end = own + (step - shared) * (SPLITS * ROWS), 0, HEADS
        if SPLITS > 1 and step < shared:
            start, head_begin, head_end = step * ROWS, split * HEADS // SPLITS, (split + 1) * HEADS // SPLITS
        acc = _head_sum(
            q, k, lse, table, info + _HEADER, norms, scale, column, vision, k_begin, q_begin, shift, start, number, b,
            q_longest, q_head, q_token, k_head, k_block, k_token, k_column, lse_batch, lse_head, lse_row,
            head_begin, head_end, HEADS, GROUP, D, PAGE_SIZE, KEYS, ROWS, COLUMNS,
        )  # fmt: skip
        if SPLITS > 1 and step < shared:
            r = start + tl.arange(0, ROWS)
            at = shares + ((b * SPLITS + split) * k_longest + column)[:, None] * SHARED + r[None, :]
            tl.store(at, acc, mask=(column < k_length)[:, None])
        else:
            sums += tl.sum(acc, axis=1)
            tops = tl.maximum(tops, tl.max(acc, axis=1))

    if SPLITS > 1:
        tails += (b * SPLITS + split) * 2 * k_longest + column
        tl.store(tails, sums, mask=column < k_length)
        tl.store(tails + k_longest, tops, mask=column < k_length)
    else:
        written = column < (k_length if PACKED else k_longest)
        at = b * out_batch + k_begin + column
        tl.store(total + at, sums * share, mask=written)
        # Terms are not negative, so the sum is NaN if and only if one of them is.
        tl.store(peak + at, tl.where(sums == sums, tops, sums) * share, mask=written)


@triton.jit(do_not_specialize=["q_longest", "k_longest", "max_query", "lse_row"])
def map_kernel(
    q,  # [B, Hq, Lq, D]
    k,  # [B, Hk, Lk, D]
    types,  # [B, Lk] uint8
    lse,  # [B, Hq, Lq] float32, or None: norms
    info,
    norms,  # [B, Hq, q_longest, 2] float32, or None: lse
    out,  # [B, max_query, Lk] float32
    scale,  # times log2(e)
    q_longest,
    k_longest,  # Lk
    max_query,
    q_batch, q_head, q_token,
    k_batch, k_head, k_block, k_token, k_column,
    types_batch,
    lse_batch, lse_head, lse_row,
    HEADS: tl.constexpr,  # Hk
    GROUP: tl.constexpr,  # Hq / Hk
    D: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per tile of the head mean map: KEYS columns, ROWS query rows."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(k_longest, KEYS)
    column = pid % tiles * KEYS + tl.arange(0, KEYS)
    start = pid // tiles % tl.cdiv(max_query, ROWS) * ROWS
    b = (pid // tiles // tl.cdiv(max_query, ROWS)).to(tl.int64)
    info += b * (_HEADER + q_longest)
    shift, number = tl.load(info + 2), tl.load(info + 4)
    vision = is_vision(tl.load(types + b * types_batch + column, mask=column < k_longest, other=0))
    acc = _head_sum(
        q + b * q_batch, k + b * k_batch, lse, None, info + _HEADER, norms, scale, column, vision, 0, 0, shift, start,
        number, b, q_longest, q_head, q_token, k_head, k_block, k_token, k_column, lse_batch, lse_head, lse_row,
        0, HEADS, HEADS, GROUP, D, 0, KEYS, ROWS, COLUMNS,
    )  # fmt: skip
    r = start + tl.arange(0, ROWS)
    at = out + (b * max_query + r)[None, :] * k_longest + column[:, None]
    tl.store(at, acc * (1.0 / (HEADS * GROUP)), mask=(column < k_longest)[:, None] & (r < max_query)[None, :])


@triton.jit(do_not_specialize=["q_longest", "k_longest", "blocks", "table_batch"])
def reduce_kernel(
    types,
    table,
    info,
    shares,  # [B, SPLITS, k_longest, SHARED] float32
    tails,  # [B, SPLITS, 2, k_longest] float32
    total,  # [B, Lk] or [total_k] float32
    peak,
    q_longest,
    k_longest,
    blocks,
    types_batch,
    table_batch,
    out_batch,
    HEADS: tl.constexpr,  # Hq
    PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per tile of keys: adds the splits in order, then takes sum and maximum over rows."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(k_longest, KEYS)
    column = pid % tiles * KEYS + tl.arange(0, KEYS)
    b = (pid // tiles).to(tl.int64)
    info += b * (_HEADER + q_longest)
    k_begin, k_length, number = tl.load(info + 1), tl.load(info + 3), tl.load(info + 4)
    if table is not None:
        table += b * table_batch
    kind = _kinds(types + b * types_batch + k_begin, table, column, column < k_length, blocks, PAGE_SIZE)
    vision = is_vision(kind)
    number = tl.where(tl.max(vision.to(tl.int32)) == 1, number, 0)

    shares += b * SPLITS * k_longest * SHARED + column.to(tl.int64)[:, None] * SHARED
    tails += b * SPLITS * 2 * k_longest + column
    sums = tl.zeros([KEYS], tl.float32)
    tops = tl.zeros([KEYS], tl.float32)
    for start in range(0, tl.minimum(number, SHARED), ROWS):
        r = start + tl.arange(0, ROWS)
        acc = tl.zeros([KEYS, ROWS], tl.float32)
        for split in tl.static_range(SPLITS):
            at = shares + split * k_longest * SHARED + r[None, :]
            acc += tl.load(at, mask=vision[:, None] & (r < number)[None, :], other=0.0)
        sums += tl.sum(acc, axis=1)
        tops = tl.maximum(tops, tl.max(acc, axis=1))
    if number > SHARED:
        for split in tl.static_range(SPLITS):
            sums += tl.load(tails + split * 2 * k_longest, mask=vision, other=0.0)
            tops = tl.maximum(tops, tl.load(tails + (split * 2 + 1) * k_longest, mask=vision, other=0.0))
    written = column < (k_length if PACKED else k_longest)
    at = b * out_batch + k_begin + column
    tl.store(total + at, sums * (1.0 / HEADS), mask=written)
    tl.store(peak + at, tl.where(sums == sums, tops, sums) * (1.0 / HEADS), mask=written)
