# SPDX-License-Identifier: Apache-2.0
"""gather_tokens: out[b, i] = x[b, keep[b, i]], zero past counts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops.contract import check
from .configs import config, width_class
from .launch import Launch, Plans, as_words, cdiv, coalesced, signature


@triton.jit(do_not_specialize=["length", "capacity", "outer", "inner", "counts_batch"])
def _gather_kernel(
    x,  # [B, L, outer, inner, width]
    keep,  # [B, K] int64
    counts,  # [B] int32
    out,  # [B, K, outer, inner, width]
    length,  # L
    capacity,  # K
    outer,
    inner,
    width,
    x_batch,  # strides of x ...
    x_token,
    x_outer,
    x_inner,
    keep_batch,  # ... keep
    counts_batch,  # ... and counts
    ALIGN_END: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program copies ROWS tokens of one sequence at one (outer, inner), COLUMNS elements of each."""
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(width, COLUMNS)
    column = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_tiles
    middle = (pid % (outer * inner)).to(tl.int64)
    pid = pid // (outer * inner)
    row_tiles = tl.cdiv(capacity, ROWS)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    b = (pid // row_tiles).to(tl.int64)

    kept = tl.minimum(tl.maximum(tl.load(counts + b * counts_batch), 0), capacity)
    entry = row - (capacity - kept) if ALIGN_END else row
    index = tl.load(keep + b * keep_batch + entry, mask=(entry >= 0) & (entry < kept), other=-1)  # [ROWS] int64
    valid = (index >= 0) & (index < length)

    source = x + b * x_batch + middle // inner * x_outer + middle % inner * x_inner
    token = tl.load(
        source + index[:, None] * x_token + column[None, :],
        mask=valid[:, None] & (column < width)[None, :],
        other=0,
    )
    target = out + ((b * capacity + row)[:, None] * (outer * inner) + middle) * width + column[None, :]
    tl.store(target, token, mask=(row < capacity)[:, None] & (column < width)[None, :])


_plans = Plans()


def gather_tokens(
    x: Tensor,  # [B, L, ...]
    keep: Tensor,  # [B, K]
    counts: Tensor,  # [B]
    *,
    align_end: bool = False,
) -> Tensor:  # [B, K, ...]
    """See ``mustdrop_kernels.gather_tokens``."""
    key = signature(x, keep, counts, align_end)
    launch = _plans.get(key)
    if launch is None:
        check("gather_tokens", x, keep, counts, align_end=align_end)
        launch = _plans.add(key, _plan(x, keep, counts, align_end))
    out = x.new_empty(keep.shape[0], keep.shape[1], *x.shape[2:])
    if out.numel():
        launch(_five_dims(as_words(x)), keep, counts, as_words(out))
    return out


def _five_dims(x: Tensor) -> Tensor:
    """Collapse x to the five dimensions that the kernel has strides for; copies if no view does."""
    return x if x.dim() <= 5 else x.flatten(2)


def _plan(x: Tensor, keep: Tensor, counts: Tensor, align_end: bool) -> Launch:
    words = _five_dims(as_words(x))
    (outer, x_outer), (inner, x_inner), (width, _) = coalesced(words, first=2, at_most=3)
    batch, capacity = keep.shape
    chosen = config("gather", width_class(width), x.device)
    programs = batch * cdiv(capacity, chosen.ROWS) * outer * inner * cdiv(width, chosen.COLUMNS)
    sizes = (x.shape[1], capacity, outer, inner, width)
    strides = (words.stride(0), words.stride(1), x_outer, x_inner, keep.stride(0), counts.stride(0))
    return Launch(_gather_kernel, (programs,), (*sizes, *strides, align_end, chosen.ROWS, chosen.COLUMNS), chosen)
