# SPDX-License-Identifier: Apache-2.0
"""spatial_merge: windows of similar neighbors become their weighted mean.

similarity = (|sum u|^2 - sum |u|^2) / (n (n-1)) with u = x / max(|x|, 1e-8), the mean cosine over ordered pairs.
Four kernels: similarity of each window; its rank among the windows of its image, if the selection uses ranks; the
output row of each token; and the output rows. A 2-D grid is a 3-D grid with one frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.contract import check
from .configs import config, length_class
from .launch import Launch, Plans, cdiv, power_of_two, signature
from .numbers import narrow, single, widen
from .order import ordered_key


@triton.jit
def _members(w, T, H, W, t: tl.constexpr, h: tl.constexpr, v: tl.constexpr, MEMBERS: tl.constexpr):
    """The patches of window w of a grid (T, H, W) cut into windows (t, h, v), and the mask of those in the grid."""
    rows, columns = tl.cdiv(H, h), tl.cdiv(W, v)
    m = tl.arange(0, MEMBERS)
    z = w // (rows * columns) * t + m // (h * v)
    y = w // columns % rows * h + m // v % h
    x = w % columns * v + m % v
    return (z * H + y) * W + x, (m < t * h * v) & (z < T) & (y < H) & (x < W)


@triton.jit(do_not_specialize=["T", "H", "W", "windows", "prefix"])
def _similarity_kernel(
    x,  # [B, P+N, C]
    similarity,  # [B, windows] float32: NaN where the window cannot merge
    T, H, W,
    windows,
    prefix,
    x_batch,
    x_token,
    C: tl.constexpr,
    t: tl.constexpr, h: tl.constexpr, v: tl.constexpr,
    UNIFORM: tl.constexpr,
    MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per window. Channels that do not fit a tile are read twice, the second time from the cache."""
    pid = tl.program_id(0)
    w, b = pid % windows, (pid // windows).to(tl.int64)
    patch, present = _members(w, T, H, W, t, h, v, MEMBERS)
    rows = x + b * x_batch + (prefix + patch).to(tl.int64)[:, None] * x_token

    squares = tl.zeros([MEMBERS], tl.float32)
    for start in range(0, C, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = widen(tl.load(rows + column, mask=present[:, None] & (column < C), other=0.0))
        squares += tl.sum(value * value, axis=1)
    # Rules and constants as in csrc/spatial_merge/norms.h.
    large, small = squares > 2.0**100, squares < 2.0**-80
    scale = tl.where(large, 2.0**-100, tl.where(small, 2.0**60, 1.0))
    vanished = small
    if tl.max((large | (small & present)).to(tl.int32)) > 0:
        squares = tl.zeros([MEMBERS], tl.float32)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            value = widen(tl.load(rows + column, mask=present[:, None] & (column < C), other=0.0)) * scale[:, None]
            squares += tl.sum(value * value, axis=1)
        vanished = small & (squares < 2.0**-6)
    norm = tl.sqrt_rn(squares)
    inverse = tl.div_rn(1.0, tl.where(small, 1e-8, tl.where(norm < 1e-8 * scale, 1e-8 * scale, norm)))
    inverse = tl.where(vanished, 0.0, inverse * (tl.where(small, 1.0, scale) * 2.0**24))

    # u is 2^24 times as long, so that the inverse of the largest norm is a normal number.
    of_sum, own = 0.0, 0.0  # |sum u|^2 and sum |u|^2
    for start in range(0, C, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = widen(tl.load(rows + column, mask=present[:, None] & (column < C), other=0.0))
        unit = value * inverse[:, None]
        together = tl.sum(unit, axis=0) * 2.0**-24
        of_sum += tl.sum(together * together)
        unit *= 2.0**-24
        own += tl.sum(tl.sum(unit * unit, axis=1))
    n = tl.sum(present.to(tl.int32))
    pairs = (n * (n - 1)).to(tl.float32)
    able = (n == t * h * v) & (n > 1) if UNIFORM else n > 1
    tl.store(similarity + pid, tl.where(able, tl.div_rn(of_sum - own, pairs), float("nan")))


@triton.jit(do_not_specialize=["windows"])
def _rank_kernel(
    similarity,  # [B, windows] float32
    rank,  # [B, windows] int32
    windows,
    BLOCK: tl.constexpr,
):
    """rank = number of better windows of the image; ties to the lower index, NaN last."""
    tiles = tl.cdiv(windows, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    own = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    key = ordered_key(tl.load(similarity + b * windows + own, mask=own < windows, other=0.0))[:, None]
    better = tl.zeros([BLOCK], tl.int32)
    for start in range(0, windows, BLOCK):
        other = start + tl.arange(0, BLOCK)
        others = ordered_key(tl.load(similarity + b * windows + other, mask=other < windows, other=0.0))[None, :]
        wins = (others > key) | ((others == key) & (other[None, :] < own[:, None]))
        better += tl.sum((wins & (other < windows)[None, :]).to(tl.int32), axis=1)
    tl.store(rank + b * windows + own, better, mask=own < windows)


@triton.jit
def _count_similar(similarity, windows, threshold, BLOCK: tl.constexpr):
    """Number of windows of one image that reach the threshold."""
    number = 0
    for start in range(0, windows, BLOCK):
        w = start + tl.arange(0, BLOCK)
        value = tl.load(similarity + w, mask=w < windows, other=float("nan"))
        number += tl.sum((value >= threshold).to(tl.int32))
    return number


@triton.jit(do_not_specialize=["T", "H", "W", "batch", "windows", "prefix", "budget"])
def _plan_kernel(
    similarity,  # [B, windows] float32
    rank,  # [B, windows] int32, or None: by threshold only
    freed,  # [B, windows] int32: rows saved by the merged windows before this one; -1: it does not merge
    assignment,  # [B, P+N] int64
    counts,  # [B] int32
    threshold,
    T, H, W,
    batch,
    windows,
    prefix,
    budget,  # -1: by threshold
    t: tl.constexpr, h: tl.constexpr, v: tl.constexpr,
    UNIFORM: tl.constexpr,
    MERGED_FIRST: tl.constexpr,
    BUDGET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: the windows that merge, and the row of each token."""
    b = tl.program_id(0).to(tl.int64)
    patches = T * H * W
    rows, columns = tl.cdiv(H, h), tl.cdiv(W, v)
    limit = budget
    if UNIFORM:
        limit, image = windows, similarity
        for _ in range(0, batch):
            limit = tl.minimum(limit, _count_similar(image, windows, threshold, BLOCK))
            image += windows

    merges, saved = 0, 0  # so far
    for start in range(0, windows, BLOCK):
        w = start + tl.arange(0, BLOCK)
        if UNIFORM or BUDGET:
            merged = tl.load(rank + b * windows + w, mask=w < windows, other=limit) < limit
        else:
            merged = tl.load(similarity + b * windows + w, mask=w < windows, other=float("nan")) >= threshold
        deep = tl.minimum(T - w // (rows * columns) * t, t)
        high = tl.minimum(H - w // columns % rows * h, h)
        wide = tl.minimum(W - w % columns * v, v)
        saves = tl.where(merged, deep * high * wide - 1, 0)
        before = saved + tl.cumsum(saves) - saves
        tl.store(freed + b * windows + w, tl.where(merged, before, -1), mask=w < windows)
        merges += tl.sum(merged.to(tl.int32))
        saved += tl.sum(saves)
    tl.store(counts + b, prefix + patches - saved)
    tl.debug_barrier()  # other threads of this program read freed

    assignment += b * (prefix + patches)
    for p in range(0, prefix):
        tl.store(assignment + p, p)
    placed = prefix + merges if MERGED_FIRST else prefix  # the row of the next token in raster order
    for start in range(0, patches, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z, y, x = i // (H * W) // t, i // W % H // h, i % W // v
        w = (z * rows + y) * columns + x
        head = (z * t * H + y * h) * W + x * v  # the first token of the window
        goes = tl.load(freed + b * windows + w, mask=i < patches, other=-1) >= 0
        if MERGED_FIRST:
            placing = (~goes & (i < patches)).to(tl.int32)
            row = placed + tl.cumsum(placing) - placing
            first = tl.load(rank + b * windows + w, mask=goes & (i < patches), other=0)
            tl.store(assignment + prefix + i, tl.where(goes, prefix + first, row).to(tl.int64), mask=i < patches)
        else:
            placing = ((~goes | (head == i)) & (i < patches)).to(tl.int32)
            row = placed + tl.cumsum(placing) - placing
            tl.store(assignment + prefix + i, row.to(tl.int64), mask=placing == 1)
        placed += tl.sum(placing)
    if not MERGED_FIRST:
        tl.debug_barrier()  # other threads of this program read assignment
        for start in range(0, patches, BLOCK):
            i = start + tl.arange(0, BLOCK)
            z, y, x = i // (H * W) // t, i // W % H // h, i % W // v
            w = (z * rows + y) * columns + x
            head = (z * t * H + y * h) * W + x * v
            goes = tl.load(freed + b * windows + w, mask=i < patches, other=-1) >= 0
            follows = goes & (head != i) & (i < patches)
            tl.store(assignment + prefix + i, tl.load(assignment + prefix + head, mask=follows, other=0), mask=follows)


@triton.jit(do_not_specialize=["T", "H", "W", "windows", "prefix", "capacity"])
def _write_kernel(
    x,  # [B, P+N, C]
    sizes,  # [B, P+N] float32, or None: ones
    assignment,  # [B, P+N] int64
    freed,  # [B, windows] int32
    tokens,  # [B, capacity, C]
    out_sizes,  # [B, capacity] float32
    T, H, W,
    windows,
    prefix,
    capacity,
    x_batch,
    x_token,
    sizes_batch,
    C: tl.constexpr,
    t: tl.constexpr, h: tl.constexpr, v: tl.constexpr,
    MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per COLUMNS channels of one window; the last one of each image copies the prefix."""
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS if C > 0 else 1
    pid = tl.program_id(0)
    column = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first_columns = pid % column_tiles == 0  # this program writes the sizes too
    w = pid // column_tiles % (windows + 1)
    b = (pid // column_tiles // (windows + 1)).to(tl.int64)
    length = prefix + T * H * W
    x += b * x_batch
    assignment += b * length
    tokens += b * capacity * C
    out_sizes += b * capacity

    if w == windows:
        for start in range(0, prefix, MEMBERS):
            token = start + tl.arange(0, MEMBERS)
            there = token < prefix
            size = tl.full([MEMBERS], 1.0, tl.float32)
            if sizes is not None:
                size = tl.load(sizes + b * sizes_batch + token, mask=there, other=0.0)
            mask = there[:, None] & (column < C)
            copied = tl.load(x + token.to(tl.int64)[:, None] * x_token + column, mask=mask)
            tl.store(tokens + token.to(tl.int64)[:, None] * C + column, copied, mask=mask)
            if first_columns:
                tl.store(out_sizes + token, size, mask=there)
    else:
        patch, present = _members(w, T, H, W, t, h, v, MEMBERS)
        size = present.to(tl.float32)
        if sizes is not None:
            size = tl.load(sizes + b * sizes_batch + prefix + patch, mask=present, other=0.0)
        row = tl.load(assignment + prefix + patch, mask=present, other=0)  # [MEMBERS] int64
        mask = present[:, None] & (column < C)
        value = tl.load(x + (prefix + patch).to(tl.int64)[:, None] * x_token + column, mask=mask, other=0.0)
        saved = tl.load(freed + b * windows + w)
        if saved < 0:
            tl.store(tokens + row[:, None] * C + column, value, mask=mask)
            if first_columns:
                tl.store(out_sizes + row, size, mask=present)
        else:
            member = tl.arange(0, MEMBERS)
            total = tl.sum(size)
            share = size * 2.0**-12  # so that the sum stays in float32
            mean = tl.div_rn(tl.sum(share[:, None] * widen(value), axis=0)[None, :], total * 2.0**-12)
            # Row 0 of the tile is the merged token; the others zero the rows that merging has freed, from the end.
            last = tl.sum(present.to(tl.int32))
            target = tl.where(member == 0, tl.max(row), length - saved - member)
            inside = (member < last) & (target < capacity)
            out = tl.where(member[:, None] == 0, mean, 0.0)
            at = tokens + target.to(tl.int64)[:, None] * C + column
            tl.store(at, narrow(out, x.dtype.element_ty), mask=inside[:, None] & (column < C))
            if first_columns:
                tl.store(out_sizes + target, tl.where(member == 0, total, 0.0), mask=inside)


_plans = Plans()


class _Plan:
    """Sizes of the results and of the workspace, and the launches."""

    def __init__(
        self,
        x: Tensor,
        grid: Sequence[int],
        window: Sequence[int],
        threshold: float,
        budget: int | None,
        uniform: bool,
        prefix: int,
        sizes: Tensor | None,
        merged_first: bool,
    ) -> None:
        batch, length, channels = x.shape
        self.batch, self.length, self.channels = batch, length, channels
        self.capacity = length if budget is None else length - budget * (prod(window) - 1)
        frames, extent = (1, *grid)[-3:], (1, *window)[-3:]
        # Rows and columns beyond the border in every window are skipped; with `uniform` such windows do not merge.
        inside = tuple(min(e, max(g, 1)) for g, e in zip(frames, extent, strict=True))
        if uniform and inside != extent:
            threshold = math.inf
        extent = inside
        self.windows = prod(cdiv(g, e) for g, e in zip(frames, extent, strict=True))
        self.ranks = uniform or budget is not None or merged_first

        members = power_of_two(prod(extent))
        tile = config("merge_rows", "any", x.device)
        columns = power_of_two(channels, 1, max(tile.ELEMENTS // members, 16))
        programs = batch * self.windows
        strides = (x.stride(0), x.stride(1))
        self.similarity = Launch(
            _similarity_kernel,
            (programs,),
            (*frames, self.windows, prefix, *strides, channels, *extent, uniform, members, columns),
            tile,
        )
        pairs = config("merge_rank", "any", x.device)
        self.rank = Launch(_rank_kernel, (batch * cdiv(self.windows, pairs.BLOCK),), (self.windows, pairs.BLOCK), pairs)
        row = config("merge_plan", length_class(length), x.device)
        limit = -1 if budget is None else budget
        decision = (uniform, merged_first, budget is not None)
        self.plan = Launch(
            _plan_kernel,
            (batch,),
            (single(threshold), *frames, batch, self.windows, prefix, limit, *extent, *decision, row.BLOCK),
            row,
        )
        sizes_batch = 0 if sizes is None else sizes.stride(0)
        self.write = Launch(
            _write_kernel,
            (batch * (self.windows + 1) * max(cdiv(channels, columns), 1),),
            (*frames, self.windows, prefix, self.capacity, *strides, sizes_batch, channels, *extent, members, columns),
            tile,
        )


def spatial_merge(
    x: Tensor,  # [B, P+N, C]
    grid: Sequence[int],
    window: Sequence[int],
    threshold: float = 0.8,
    *,
    budget: int | None = None,
    uniform: bool = False,
    num_prefix_tokens: int = 1,
    sizes: Tensor | None = None,  # [B, P+N]
    merged_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``mustdrop_kernels.spatial_merge``."""
    key = signature(x, grid, window, threshold, budget, uniform, num_prefix_tokens, sizes, merged_first)
    plan = _plans.get(key)
    if plan is None:
        options = {"budget": budget, "uniform": uniform, "num_prefix_tokens": num_prefix_tokens, "sizes": sizes}
        check("spatial_merge", x, grid, window, threshold, **options)
        made = _Plan(x, grid, window, threshold, budget, uniform, num_prefix_tokens, sizes, merged_first)
        plan = _plans.add(key, made)
    tokens = x.new_empty(plan.batch, plan.capacity, plan.channels)
    counts = x.new_empty(plan.batch, dtype=torch.int32)
    assignment = x.new_empty(plan.batch, plan.length, dtype=torch.int64)
    out_sizes = x.new_empty(plan.batch, plan.capacity, dtype=torch.float32)
    similarity = x.new_empty(plan.batch, plan.windows, dtype=torch.float32)
    freed = x.new_empty(plan.batch, plan.windows, dtype=torch.int32)
    rank = torch.empty_like(freed) if plan.ranks else None

    plan.similarity(x, similarity)
    if plan.ranks:
        plan.rank(similarity, rank)
    plan.plan(similarity, rank, freed, assignment, counts)
    plan.write(x, sizes, assignment, freed, tokens, out_sizes)
    return tokens, counts, assignment, out_sizes
