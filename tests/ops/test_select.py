# SPDX-License-Identifier: Apache-2.0
"""select_dual and select_topk: exact agreement with the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import (
    PADDING,
    QUERY,
    TEXT,
    VISION,
    Watch,
    dual_margin,
    dual_thresholds,
    f64,
    generator,
    in_buffer,
    prompt,
    types_tensor,
)
from .changes import BUDGETS, HALF, INT, OPTIONS, TYPES, VALUES, set_to, to_shape

LENGTHS = [1, 2, 5, 63, 64, 65, 129, 671, 1025]


def types_for(batch: int, length: int, device: str) -> Tensor:
    sides = ("left", "right")
    pads = [(5 * b) % max(1, length // 3) for b in range(batch)]
    rows = [prompt(length, images=1 + b % 3, pad=pads[b], side=sides[b % 2]) for b in range(batch)]
    return types_tensor(rows, device).reshape(batch, length)


def values_for(batch: int, length: int, seed: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Distinct positive values over three orders of magnitude."""
    order = torch.stack([torch.randperm(length, generator=generator(seed + b)) for b in range(batch)])
    return (10 ** (3 * (order + 1) / (length + 1) - 3)).to(dtype).to(device)


def protect(types: Tensor, share: float, seed: int) -> Tensor:
    """Random tokens of every type: protecting padding or text has no effect."""
    return (torch.rand(types.shape, generator=generator(seed)) < share).to(types.device)


def compare(got, want: list, capacity: int, like: Tensor) -> None:
    keep, counts = oracle.as_keep(want, capacity)
    assert (got.keep.dtype, got.counts.dtype) == (torch.int64, torch.int32)
    assert got.keep.device == got.counts.device == like.device
    assert got.counts.tolist() == counts.tolist()
    assert tuple(got.keep.shape) == keep.shape
    assert got.keep.tolist() == keep.tolist()


def check_dual(backend, total, peak, types, thresholds, *, protected=None, capacity=None, drop_multiple=1, clear=True):
    arrays = f64(total), f64(peak), types.cpu().numpy()
    if clear:
        assert dual_margin(*arrays, *thresholds) > 1e-4, "the case must be clear"
    watch = Watch(total, peak, types, protected)
    got = backend.select_dual(
        total, peak, types, *thresholds, protected=protected, capacity=capacity, drop_multiple=drop_multiple
    )
    assert watch.nothing_changed()
    mask = None if protected is None else protected.cpu().numpy()
    want = oracle.select_dual(*arrays, *thresholds, mask, drop_multiple)
    compare(got, want, total.shape[1] if capacity is None else capacity, total)
    return want


def check_topk(backend, scores, types, k, *, budgets=None, protected=None, capacity=None, drop_multiple=1):
    watch = Watch(scores, types, budgets, protected)
    got = backend.select_topk(
        scores, types, k, budgets=budgets, protected=protected, capacity=capacity, drop_multiple=drop_multiple
    )
    assert watch.nothing_changed()
    want = oracle.select_topk(
        f64(scores),
        types.cpu().numpy(),
        k,
        None if budgets is None else budgets.cpu().tolist(),
        None if protected is None else protected.cpu().numpy(),
        drop_multiple,
    )
    compare(got, want, scores.shape[1] if capacity is None else capacity, scores)
    return want


# ---------------------------------------------------------------------------------------------- select_dual


def dual_case(batch, length, dtype=torch.float32, device="cpu", seed=0, quantiles=(0.6, 0.6)):
    types = types_for(batch, length, device)
    total = values_for(batch, length, seed, dtype, device)
    peak = values_for(batch, length, seed + 100, dtype, device)
    thresholds = dual_thresholds(f64(total), f64(peak), types.cpu().numpy(), quantiles)
    return total, peak, types, thresholds


@pytest.mark.parametrize("length", LENGTHS)
def test_dual_lengths(backend, length, dtype):
    batch = 2 if length < 200 else 1  # one row's thresholds have room between a thousand values
    want = check_dual(backend, *dual_case(batch, length, dtype, backend.device))
    if length > 60:
        assert 0 < sum(map(len, want)) < batch * length


@pytest.mark.slow
@pytest.mark.parametrize("length", [4099, 18432])
def test_dual_long(backend, length):
    types = types_for(1, length, backend.device)
    total = torch.where(values_for(1, length, 1) > 0.03, 1.0, 0.001).to(backend.device)
    check_dual(backend, total, total.clone(), types, (0.1 / float(total.sum()), 0.1), drop_multiple=16)


@pytest.mark.parametrize("quantiles", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.3, 0.9), (0.9, 0.3)])
def test_dual_both_thresholds(backend, quantiles):
    """A token goes only if it is below both."""
    check_dual(backend, *dual_case(2, 50, device=backend.device, quantiles=quantiles))


def test_dual_published_thresholds(backend):
    types = types_tensor([prompt(600, queries=40)], backend.device)
    total = values_for(1, 600, 7, device=backend.device)
    for g, i in ((0.001, 0.001), (0.0012, 0.001), (0.011, 0.01), (0.005, 0.001)):
        check_dual(backend, total, total / 7, types, (g, i), clear=False)


def test_dual_comparisons_are_strict(backend):
    """A value equal to its threshold is kept. The sum is a power of two, so that the products are exact."""
    types = types_tensor([[VISION] * 4 + [QUERY]], backend.device)
    total = torch.tensor([[0.25, 0.5, 0.125, 1.125, 0.0]], device=backend.device)
    peak = torch.tensor([[0.125, 0.0625, 0.25, 0.0625, 0.0]], device=backend.device)
    for g, i in ((0.125, 1.0), (0.25, 0.125), (0.0625, 0.25), (1.0, 0.0625), (0.5625, 0.0626)):
        check_dual(backend, total, peak, types, (g, i), clear=False)


def test_dual_thresholds_are_float32(backend):
    """0.7 in float32 is below 0.7: a value of exactly float32(0.7) is not below the threshold 0.7, and stays."""
    rounded = torch.tensor(0.7).item()
    assert rounded < 0.7
    below = float(np.nextafter(np.float32(0.7), np.float32(0)))
    types = types_tensor([[VISION, QUERY], [VISION, QUERY]], backend.device)
    values = torch.tensor([[rounded, 1 - rounded], [below, 1 - below]], device=backend.device)
    assert values.sum(1).tolist() == [1, 1]
    zero = torch.zeros_like(values)
    by_total = backend.select_dual(values, zero, types, 0.7, 1.0)
    assert by_total.counts.tolist() == [2, 1]
    by_peak = backend.select_dual(values, values, types, 2.0, 0.7)
    assert by_peak.counts.tolist() == [2, 1]


def test_dual_sum_runs_over_the_whole_row(backend):
    """The sum includes tokens other than vision."""
    types = types_tensor([[TEXT, VISION, VISION, QUERY, PADDING]], backend.device)
    peak = torch.zeros(1, 5, device=backend.device)
    total = torch.tensor([[8.0, 1.0, 2.0, 4.0, 1.0]], device=backend.device)  # 16 in all, 3 on vision tokens
    got = backend.select_dual(total, peak, types, 0.1, 1.0)  # 1.6
    assert got.keep.tolist() == [[0, 2, 3, -1, -1]]


@pytest.mark.parametrize(
    "thresholds", [(0.0, 0.0), (-1.0, 1.0), (math.inf, math.inf), (1.0, 2.0), (math.nan, 1.0)], ids=str
)
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, 3e38])
def test_dual_all_equal(backend, thresholds, fill):
    types = types_for(2, 40, backend.device)
    total = torch.full((2, 40), fill, device=backend.device)
    if fill == 3e38:
        total[:, 1:] = 0  # a sum that still fits
    check_dual(backend, total, torch.full_like(total, min(fill, 1.0)), types, thresholds, clear=False)


def test_dual_nan_and_infinity(backend):
    """A NaN in total makes the sum NaN and keeps the whole sequence; a NaN peak keeps only its token."""
    types = types_for(4, 30, backend.device)
    total, peak = values_for(4, 30, 1, device=backend.device), values_for(4, 30, 2, device=backend.device)
    total[0, 4] = math.nan
    peak[1, types[1] == VISION] = 0
    vision = int((types[1] == VISION).nonzero()[2])
    peak[1, vision] = math.nan
    total[2, 5] = math.inf
    total[3, 5], total[3, 6] = math.inf, -math.inf
    want = check_dual(backend, total, peak, types, (1.0, 10.0), clear=False)
    padding = (types == PADDING).sum(1).tolist()
    assert len(want[0]) == 30 - padding[0]
    assert len(want[3]) == 30 - padding[3]
    assert vision in want[1]
    assert len(want[1]) == int((types[1] != VISION).sum()) - padding[1] + 1


def test_dual_negative_values(backend):
    types = types_for(1, 20, backend.device)
    total = -values_for(1, 20, 1, device=backend.device)
    check_dual(backend, total, total, types, (0.5, 0.1), clear=False)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("drop_multiple", [1, 4])
def test_dual_protected(backend, share, drop_multiple):
    total, peak, types, thresholds = dual_case(3, 65, device=backend.device)
    protected = protect(types, share, 3)
    want = check_dual(backend, total, peak, types, thresholds, protected=protected, drop_multiple=drop_multiple)
    for b in range(3):
        stays = (types[b] != PADDING) & protected[b]
        assert set(stays.nonzero().flatten().tolist()) <= set(want[b])


@pytest.mark.parametrize("drop_multiple", [1, 2, 3, 7, 16, 64, 1000])
@pytest.mark.parametrize("op", ["dual", "topk"])
def test_drop_multiple(backend, op, drop_multiple):
    total, peak, types, thresholds = dual_case(3, 65, device=backend.device)
    if op == "dual":
        want = check_dual(backend, total, peak, types, thresholds, drop_multiple=drop_multiple)
    else:
        want = check_topk(backend, total, types, 11, drop_multiple=drop_multiple)
    for b in range(3):
        assert (int((types[b] != PADDING).sum()) - len(want[b])) % drop_multiple == 0


@pytest.mark.parametrize("op", ["dual", "topk"])
def test_drop_multiple_ties_and_nan(backend, op):
    """The tokens kept for the multiple are the best of the dropped: ties to the lower index, NaN last."""
    types = types_tensor([[VISION] * 12 + [QUERY]] * 3, backend.device)
    total = torch.zeros(3, 13, device=backend.device)
    total[1, :6] = -1.0
    total[2, ::2] = 0.5
    if op == "topk":
        total[1, 8] = math.nan
        total[2, 1] = -math.inf
        total[0, 3] = -0.0
    for multiple in (1, 5, 7, 8):
        if op == "dual":
            total[..., 12] = 50.0
            check_dual(backend, total, total * 0, types, (0.9, 0.5), drop_multiple=multiple)
        else:
            check_topk(backend, total, types, 0, drop_multiple=multiple)
            check_topk(backend, total, types, 4, drop_multiple=multiple)


@pytest.mark.parametrize("capacity", [0, 1, 7, 30, 65, 80])
@pytest.mark.parametrize("op", ["dual", "topk"])
def test_capacity(backend, op, capacity):
    """counts may exceed the capacity; keep holds the first tokens."""
    total, peak, types, thresholds = dual_case(3, 65, device=backend.device)
    if op == "dual":
        check_dual(backend, total, peak, types, thresholds, capacity=capacity)
    else:
        check_topk(backend, total, types, 13, capacity=capacity)
        check_topk(backend, total, types, 13, capacity=capacity, drop_multiple=8, protected=protect(types, 0.3, 1))


# ---------------------------------------------------------------------------------------------- select_topk


@pytest.mark.parametrize("length", LENGTHS)
def test_topk_lengths(backend, length, dtype):
    types = types_for(3, length, backend.device)
    scores = torch.randn(3, length, generator=generator(length)).to(dtype).to(backend.device)
    for k in {0, 1, length // 3, length, length + 5}:
        check_topk(backend, scores, types, k)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4099, 18432])
def test_topk_long(backend, length):
    types = types_for(2, length, backend.device)
    scores = torch.randn(2, length, generator=generator(1)).to(backend.device)
    check_topk(backend, scores, types, length // 10)
    check_topk(backend, scores.bfloat16(), types, length // 3, drop_multiple=16)
    check_topk(backend, torch.zeros_like(scores), types, 1000)


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("length", [40, 700])
def test_topk_all_equal(backend, fill, dtype, length):
    types = types_for(2, length, backend.device)
    scores = torch.full((2, length), fill, dtype=dtype, device=backend.device)
    for k in (0, 1, 13, length):
        want = check_topk(backend, scores, types, k)
        vision = (types[0] == VISION).nonzero().flatten().tolist()
        assert [j for j in want[0] if j in vision] == vision[:k], "ties go to the lower index"


def test_topk_order_of_special_values(backend, dtype):
    """inf, normal, subnormal, equal zeros of both signs, negative, -inf, NaN."""
    tiny = torch.finfo(dtype).tiny / 4
    order = [math.inf, 2.0, 1.0, tiny, 0.0, -0.0, 0.0, -tiny, -1.0, -2.0, -math.inf, math.nan, -math.nan]
    n = len(order)
    for seed in range(4):
        shuffle = torch.randperm(n, generator=generator(seed))
        scores = torch.tensor(order, dtype=dtype)[shuffle][None].to(backend.device)
        types = torch.full((1, n), VISION, dtype=torch.uint8, device=backend.device)
        for k in range(n + 1):
            check_topk(backend, scores, types, k)


def test_topk_many_ties(backend, dtype):
    """Few distinct values, so that every budget splits a tie."""
    types = types_for(2, 300, backend.device)
    scores = torch.randint(0, 4, (2, 300), generator=generator(5)).to(dtype).to(backend.device)
    for k in (1, 50, 100, 137, 200):
        check_topk(backend, scores, types, k)


@pytest.mark.parametrize("step", [8, 16, 32, 64])
@pytest.mark.parametrize("high", [True, False])
def test_topk_regular_patterns(backend, step, high):
    """Outliers at every n-th score, which mislead a selection that samples with that stride."""
    length = 1500
    scores = torch.rand(1, length, generator=generator(step))
    scores[:, ::step] += 10.0 if high else -10.0
    types = torch.full((1, length), VISION, dtype=torch.uint8)
    for k in (1, length // step, length // 2, length - 3):
        check_topk(backend, scores.to(backend.device), types.to(backend.device), k)


def test_topk_neighbors_in_float32(backend):
    """Values of either sign that are one unit in the last place apart are ordered."""
    base = torch.tensor([1.0, -1.0, 1e-38, 3e38])
    bits = base.view(torch.int32)[:, None] + torch.arange(20, dtype=torch.int32)
    scores = bits.view(torch.float32).reshape(1, -1)
    scores = scores[:, torch.randperm(80, generator=generator(2))].to(backend.device)
    types = torch.full((1, 80), VISION, dtype=torch.uint8, device=backend.device)
    for k in range(0, 80, 7):
        check_topk(backend, scores, types, k)


def test_topk_only_vision_competes(backend):
    """Text and padding do not count toward k, even with the highest scores."""
    types = types_for(3, 40, backend.device)
    scores = torch.randn(3, 40, generator=generator(1)).to(backend.device)
    scores[types != VISION] = math.inf
    want = check_topk(backend, scores, types, 6)
    for b in range(3):
        assert sum(int(types[b, j]) == VISION for j in want[b]) == 6


@pytest.mark.parametrize("budgets", [[0, 5, 100], [-3, 1, 7], [2**31 - 1, -(2**31), 3]], ids=str)
@pytest.mark.parametrize("capacity", [None, 20])
def test_topk_budgets_on_the_device(backend, budgets, capacity):
    """One budget per sequence instead of k; negative ones count as 0."""
    types = types_for(3, 50, backend.device)
    scores = torch.randn(3, 50, generator=generator(1)).to(backend.device)
    per_row = torch.tensor(budgets, dtype=torch.int32, device=backend.device)
    check_topk(backend, scores, types, 17, budgets=per_row, capacity=capacity)
    wide = per_row.repeat_interleave(2)[::2]
    check_topk(backend, scores, types, 0, budgets=wide, capacity=capacity, drop_multiple=4)


@pytest.mark.parametrize("k", [0, 3, 20, 100])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_topk_protected(backend, k, share):
    """Protected tokens come first and are all kept, even if they exceed k."""
    types = types_for(3, 65, backend.device)
    scores = torch.randn(3, 65, generator=generator(1)).to(backend.device)
    protected = protect(types, share, 9)
    want = check_topk(backend, scores, types, k, protected=protected)
    for b in range(3):
        vision = types[b] == VISION
        number = int((vision & protected[b]).sum())
        assert sum(bool(vision[j]) for j in want[b]) == max(number, min(k, int(vision.sum())))
    check_topk(backend, torch.full_like(scores, math.nan), types, k, protected=protected, drop_multiple=3)


# ---------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["padding", "text", "vision", "query", "unknown"])
def test_one_kind_only(backend, kind):
    value = {"padding": PADDING, "text": TEXT, "vision": VISION, "query": QUERY, "unknown": 200}[kind]
    types = torch.full((2, 9), value, dtype=torch.uint8, device=backend.device)
    total = values_for(2, 9, 1, device=backend.device)
    want = check_dual(backend, total, total, types, (1.0, 2.0), clear=False)
    assert [len(w) for w in want] == ([0, 0] if kind in ("padding", "vision") else [9, 9])
    check_topk(backend, total, types, 4)
    check_topk(backend, total, types, 4, protected=torch.ones_like(types, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_empty(backend, shape):
    types = torch.zeros(shape, dtype=torch.uint8, device=backend.device)
    total = torch.zeros(shape, device=backend.device)
    for capacity in (None, 3):
        check_dual(backend, total, total, types, (0.1, 0.1), capacity=capacity, drop_multiple=4)
        check_topk(backend, total, types, 4, capacity=capacity, drop_multiple=4)


def test_views(backend, dtype):
    total, peak, types, thresholds = dual_case(3, 40, dtype, backend.device)
    protected = protect(types, 0.2, 1)
    views = [in_buffer(t) for t in (total, peak, types, protected)]
    check_dual(backend, *views[:3], thresholds, protected=views[3], drop_multiple=3)
    check_topk(backend, views[0], views[2], 9, protected=views[3], drop_multiple=3)
    one = [t[:1].expand(4, -1) for t in (total, peak, types, protected)]
    check_dual(backend, *one[:3], thresholds, protected=one[3])
    check_topk(backend, one[0], one[2], 9, protected=one[3])


def test_same_bits_every_run(backend, check_same_bits, dtype):
    total, peak, types, thresholds = dual_case(8, 90, dtype, backend.device, quantiles=(0.5, 0.8))
    check_same_bits(lambda: backend.select_dual(total, peak, types, *thresholds, drop_multiple=4))
    check_same_bits(lambda: backend.select_topk(total, types, 20, drop_multiple=4))


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "select_dual": {
        "total": VALUES,
        "peak": {"another length": to_shape(2, 13), "rank 1": to_shape(14), "another dtype": HALF, "integers": INT},
        "token_types": TYPES,
        **OPTIONS,
    },
    "select_topk": {
        "scores": VALUES,
        "token_types": TYPES,
        "k": {"negative": set_to(-1)},
        "budgets": BUDGETS,
        **OPTIONS,
    },
}
