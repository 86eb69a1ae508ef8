# SPDX-License-Identifier: Apache-2.0
"""Selection of vision tokens by two thresholds or by a budget. One program per sequence.

Both rules define candidates, the vision tokens that may be dropped, and keep the best ``stay`` of them:
two thresholds: candidate[j] = total[j] < global * sum(total) and peak[j] < individual; stay = d mod drop_multiple;
a budget: every unprotected vision token is a candidate; stay = budget minus the number of protected ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.contract import check
from .configs import config, length_class
from .launch import Launch, Plans, signature
from .numbers import single, widen
from .order import kth_key, ordered_key
from .token_types import is_token, is_vision


@triton.jit
def _is_vision(types, protected, column, n):
    """Mask of unprotected vision tokens."""
    inside = column < n
    vision = is_vision(tl.load(types + column, mask=inside, other=0))
    if protected is not None:
        vision = vision & (tl.load(protected + column, mask=inside, other=0) == 0)
    return vision


@triton.jit
def _load_dual(args, column, n):
    total, peak, types, protected, limit, individual = args
    t = widen(tl.load(total + column, mask=column < n, other=0.0))
    p = widen(tl.load(peak + column, mask=column < n, other=0.0))
    return ordered_key(t), _is_vision(types, protected, column, n) & (t < limit) & (p < individual)


@triton.jit
def _load_topk(args, column, n):
    scores, types, protected = args
    score = widen(tl.load(scores + column, mask=column < n, other=0.0))
    return ordered_key(score), _is_vision(types, protected, column, n)


@triton.jit
def _count(load: tl.constexpr, args, n, end, BLOCK: tl.constexpr):
    """Number of candidates."""
    number = 0
    for start in range(0, end, BLOCK):
        _, candidate = load(args, start + tl.arange(0, BLOCK), n)
        number += tl.sum(candidate.to(tl.int32))
    return number


@triton.jit
def _write(
    load: tl.constexpr, args, types, keep, counts, n, end, capacity, stay, key_limit, equals, BLOCK: tl.constexpr
):
    """Write the positions of all tokens except the candidates that are not among the best ``stay``."""
    kept, seen = 0, 0  # tokens kept so far; candidates so far whose key equals the limit
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key, candidate = load(args, column, n)
        equal = (candidate & (key == key_limit)).to(tl.int32)
        rank = seen + tl.cumsum(equal) - equal
        best = (key > key_limit) | ((equal == 1) & (rank < equals))
        present = is_token(tl.load(types + column, mask=column < n, other=0))
        stays = (present & (~candidate | (best & (stay > 0)))).to(tl.int32)
        slot = kept + tl.cumsum(stays) - stays
        tl.store(keep + slot, column.to(tl.int64), mask=(stays == 1) & (slot < capacity))
        kept += tl.sum(stays)
        seen += tl.sum(equal)
    tl.store(counts, kept)
    for start in range(0, capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(keep + slot, tl.full([BLOCK], -1, tl.int64), mask=(slot >= kept) & (slot < capacity))


@triton.jit(do_not_specialize=["n", "capacity", "drop_multiple"])
def _dual_kernel(
    total,  # [B, L]
    peak,  # [B, L]
    types,  # [B, L] uint8
    protected,  # [B, L] bool, or None
    keep,  # [B, capacity] int64
    counts,  # [B] int32
    global_threshold,
    individual_threshold,
    n,  # L
    capacity,
    drop_multiple,
    total_batch,  # strides
    peak_batch,
    types_batch,
    protected_batch,
    SPARE: tl.constexpr,  # drop_multiple > 1
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,  # L <= BLOCK
):
    b = tl.program_id(0).to(tl.int64)
    total += b * total_batch
    types += b * types_batch
    if protected is not None:
        protected += b * protected_batch
    end = BLOCK if ONE_TILE else n

    mass = 0.0
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mass += tl.sum(widen(tl.load(total + column, mask=column < n, other=0.0)))
    args = (total, peak + b * peak_batch, types, protected, global_threshold * mass, individual_threshold)

    stay, key_limit, equals = 0, 0, 0
    if SPARE:
        stay = _count(_load_dual, args, n, end, BLOCK) % drop_multiple
        key_limit, equals = kth_key(_load_dual, args, n, tl.maximum(stay, 1), BLOCK, ONE_TILE)
    _write(_load_dual, args, types, keep + b * capacity, counts + b, n, end, capacity, stay, key_limit, equals, BLOCK)


@triton.jit(do_not_specialize=["n", "k", "capacity", "drop_multiple", "budgets_batch"])
def _topk_kernel(
    scores,  # [B, L]
    types,  # [B, L] uint8
    protected,  # [B, L] bool, or None
    budgets,  # [B] int32, or None
    keep,  # [B, capacity] int64
    counts,  # [B] int32
    k,
    n,  # L
    capacity,
    drop_multiple,
    scores_batch,  # strides
    types_batch,
    protected_batch,
    budgets_batch,
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,  # L <= BLOCK
):
    b = tl.program_id(0).to(tl.int64)
    types += b * types_batch
    if protected is not None:
        protected += b * protected_batch
    args = (scores + b * scores_batch, types, protected)
    end = BLOCK if ONE_TILE else n

    candidates = _count(_load_topk, args, n, end, BLOCK)
    if budgets is not None:
        k = tl.load(budgets + b * budgets_batch)
    if protected is not None:
        k = tl.maximum(k, 0) - (_count(_load_topk, (args[0], types, None), n, end, BLOCK) - candidates)
    stay = tl.minimum(tl.maximum(k, 0), candidates)
    stay += (candidates - stay) % drop_multiple
    key_limit, equals = kth_key(_load_topk, args, n, tl.maximum(stay, 1), BLOCK, ONE_TILE)
    _write(_load_topk, args, types, keep + b * capacity, counts + b, n, end, capacity, stay, key_limit, equals, BLOCK)


_dual_plans, _topk_plans = Plans(), Plans()


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _outputs(types: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    batch, length = types.shape
    keep = torch.empty(batch, length if capacity is None else capacity, dtype=torch.int64, device=types.device)
    return keep, torch.empty(batch, dtype=torch.int32, device=types.device)


def select_dual(
    total: Tensor,  # [B, L]
    peak: Tensor,  # [B, L]
    token_types: Tensor,  # [B, L]
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,  # [B, L]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.select_dual``."""
    key = signature(
        total, peak, token_types, protected, global_threshold, individual_threshold, capacity, drop_multiple
    )
    launch = _dual_plans.get(key)
    if launch is None:
        options = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
        check("select_dual", total, peak, token_types, global_threshold, individual_threshold, **options)
        batch, n = token_types.shape
        chosen = config("select", length_class(n), token_types.device)
        sizes = (n, n if capacity is None else capacity, drop_multiple)
        strides = (total.stride(0), peak.stride(0), token_types.stride(0), _row_stride(protected))
        scalars = (single(global_threshold), single(individual_threshold), *sizes, *strides)
        tiles = (drop_multiple > 1, chosen.BLOCK, n <= chosen.BLOCK)
        launch = _dual_plans.add(key, Launch(_dual_kernel, (batch,), (*scalars, *tiles), chosen))
    keep, counts = _outputs(token_types, capacity)
    launch(total, peak, token_types, protected, keep, counts)
    return keep, counts


def select_topk(
    scores: Tensor,  # [B, L]
    token_types: Tensor,  # [B, L]
    k: int,
    *,
    budgets: Tensor | None = None,  # [B]
    protected: Tensor | None = None,  # [B, L]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.select_topk``."""
    key = signature(scores, token_types, budgets, protected, k, capacity, drop_multiple)
    launch = _topk_plans.get(key)
    if launch is None:
        options = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
        check("select_topk", scores, token_types, k, budgets=budgets, **options)
        batch, n = token_types.shape
        chosen = config("select", length_class(n), token_types.device)
        sizes = (min(k, n), n, n if capacity is None else capacity, min(drop_multiple, n + 1))
        strides = (scores.stride(0), token_types.stride(0), _row_stride(protected), _row_stride(budgets))
        tiles = (chosen.BLOCK, n <= chosen.BLOCK)
        launch = _topk_plans.add(key, Launch(_topk_kernel, (batch,), (*sizes, *strides, *tiles), chosen))
    keep, counts = _outputs(token_types, capacity)
    launch(scores, token_types, protected, budgets, keep, counts)
    return keep, counts
