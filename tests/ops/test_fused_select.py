# SPDX-License-Identifier: Apache-2.0
"""dual_attention_select and topk_attention_select: scores of the scoring op, decisions of the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import oracle
from .cases import (
    PADDING,
    QUERY,
    TEXT,
    VISION,
    Attention,
    Watch,
    attention,
    dual_margin,
    dual_thresholds,
    generator,
    prompt,
    relative_gap,
    same_bits,
)
from .changes import BUDGETS, DENSE, OPTIONS, set_to
from .tolerance import assert_scores


def clear_budget(total: np.ndarray, types: np.ndarray, wanted: int, protected=None, drop_multiple: int = 1) -> int:
    """The budget nearest to ``wanted`` whose cut has a margin in every sequence, also after drop_multiple."""

    def clear(budget: int) -> bool:
        for b in range(len(total)):
            vision = [j for j in range(total.shape[1]) if types[b, j] == VISION]
            first = [j for j in vision if protected is not None and protected[b, j]]
            ranked = oracle.falling(total[b], sorted(set(vision) - set(first)))
            room = max(0, budget - len(first))
            spared = max(0, len(ranked) - room) % drop_multiple
            for cut in (room, room + spared):
                if 0 < cut < len(ranked):
                    a, c = total[b, ranked[cut - 1]], total[b, ranked[cut]]
                    if a != c and relative_gap(a, c) < 2e-4:
                        return False
        return True

    return min((b for b in range(total.shape[1] + 1) if clear(b)), key=lambda b: abs(b - wanted))


def check_common(backend, case: Attention, got, want_keep, capacity, lse=None) -> None:
    total, peak = case.oracle_scores(lse)
    assert_scores(got, total, peak)
    keep, counts = oracle.as_keep(want_keep, case.types.shape[1] if capacity is None else capacity)
    assert (got.keep.dtype, got.counts.dtype) == (torch.int64, torch.int32)
    assert got.counts.tolist() == counts.tolist()
    assert got.keep.tolist() == keep.tolist()
    separate = backend.text_vision_scores(*case.arguments, lse=lse)
    assert same_bits(separate.total, got.total)
    assert same_bits(separate.peak, got.peak)


def check_selection(got, separate) -> None:
    assert same_bits(separate.keep, got.keep)
    assert same_bits(separate.counts, got.counts)


def check_dual(
    backend, case: Attention, quantiles=(0.5, 0.5), *, lse=None, protected=None, capacity=None, drop_multiple=1
):
    total, peak = case.oracle_scores(lse)
    types = case.types.cpu().numpy()
    thresholds = dual_thresholds(total, peak, types, quantiles)
    assert dual_margin(total, peak, types, *thresholds) > 1e-4, "the case must be clear"
    options = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    watch = Watch(case.q, case.k, case.types, lse, protected)
    got = backend.dual_attention_select(*case.arguments, *thresholds, lse=lse, **options)
    assert watch.nothing_changed()
    mask = None if protected is None else protected.cpu().numpy()
    want = oracle.select_dual(total, peak, types, *thresholds, mask, drop_multiple)
    check_common(backend, case, got, want, capacity, lse)
    check_selection(got, backend.select_dual(got.total, got.peak, case.types, *thresholds, **options))
    return want


def check_topk(
    backend, case: Attention, wanted, *, lse=None, budgets=None, protected=None, capacity=None, drop_multiple=1
):
    total, _ = case.oracle_scores(lse)
    types = case.types.cpu().numpy()
    mask = None if protected is None else protected.cpu().numpy()
    budget = clear_budget(total, types, wanted, mask, drop_multiple)
    options = {"budgets": budgets, "protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    watch = Watch(case.q, case.k, case.types, lse, budgets, protected)
    got = backend.topk_attention_select(*case.arguments, budget, lse=lse, **options)
    assert watch.nothing_changed()
    rows = None if budgets is None else budgets.cpu().tolist()
    want = oracle.select_topk(total, types, budget, rows, mask, drop_multiple)
    check_common(backend, case, got, want, capacity, lse)
    check_selection(got, backend.select_topk(got.total, case.types, budget, **options))
    return want


@pytest.mark.parametrize(
    ("heads", "length", "dim"),
    [((1, 1), 2, 1), ((2, 1), 3, 7), ((4, 1), 63, 64), ((4, 4), 65, 80), ((14, 2), 40, 128), ((4, 2), 130, 256)],
)
def test_shapes(backend, heads, length, dim, dtype, with_lse):
    case = attention(2, heads, None, length, dim, dtype=dtype, device=backend.device, seed=length)
    lse = case.lse() if with_lse else None
    check_dual(backend, case, lse=lse)
    check_topk(backend, case, length // 4, lse=lse)


def test_llava_size(backend, dtype):
    case = attention(1, (4, 4), None, 671, 64, dtype=dtype, device=backend.device, types=[prompt(671, queries=60)])
    want = check_dual(backend, case, (0.8, 0.8))
    assert 95 < len(want[0]) < 500
    check_topk(backend, case, 64, capacity=95 + 64 + 10)


@pytest.mark.slow
def test_long(backend, dtype):
    types = [prompt(2980, queries=100, images=3)]
    case = attention(1, (8, 2), 200, 2980, 128, dtype=dtype, device=backend.device, types=types, gain=2.0)
    check_topk(backend, case, 640, drop_multiple=16)
    check_dual(backend, case, (0.9, 0.9), drop_multiple=16)


@pytest.mark.parametrize("layout", ["window", "blhd"])
@pytest.mark.parametrize("rows", [6, 24])
def test_views_and_last_rows(backend, layout, rows):
    case = attention(3, (4, 2), rows, 24, 16, device=backend.device, layout=layout)
    check_dual(backend, case)
    check_topk(backend, case, 5)
    check_dual(backend, case, lse=case.lse())


@pytest.mark.parametrize("drop_multiple", [1, 4, 16])
@pytest.mark.parametrize("capacity", [None, 0, 10, 60])
def test_options(backend, drop_multiple, capacity):
    case = attention(3, (4, 2), None, 48, 16, device=backend.device)
    protected = (torch.rand(3, 48, generator=generator(3)) < 0.15).to(backend.device)
    options = {"drop_multiple": drop_multiple, "capacity": capacity}
    check_dual(backend, case, **options)
    check_dual(backend, case, protected=protected, **options)
    check_topk(backend, case, 7, **options)
    check_topk(backend, case, 7, protected=protected, **options)


@pytest.mark.parametrize("budgets", [[0, 100, 3], [-5, 0, 1]], ids=str)
def test_budgets(backend, budgets):
    case = attention(3, (4, 2), None, 24, 16, device=backend.device)
    check_topk(backend, case, 9, budgets=torch.tensor(budgets, dtype=torch.int32, device=backend.device))


@pytest.mark.parametrize(
    "types",
    [
        [TEXT] * 6,
        [VISION] * 6,
        [PADDING] * 6,
        [QUERY] * 6,
        [VISION, VISION, QUERY, VISION, VISION, TEXT],
        [PADDING, PADDING, VISION, VISION, QUERY, PADDING],
    ],
    ids=str,
)
def test_token_types(backend, types):
    """Sequences without vision tokens, without query rows, or empty: results stay defined."""
    case = attention(1, (4, 2), None, 6, 8, device=backend.device, types=[types])
    got = backend.dual_attention_select(*case.arguments, 0.1, 0.1)
    total, peak = case.oracle_scores()
    if dual_margin(total, peak, case.types.cpu().numpy(), 0.1, 0.1) > 1e-4:
        check_common(backend, case, got, oracle.select_dual(total, peak, case.types.cpu().numpy(), 0.1, 0.1), None)
    check_topk(backend, case, 2)


def test_without_query_rows(backend):
    """All scores are zero, so no total is below 0 = threshold * sum: the dual rule keeps all, top-k the first."""
    types = [[TEXT, VISION, VISION, VISION, TEXT]]
    case = attention(1, (4, 2), None, 5, 8, device=backend.device, types=types)
    assert backend.dual_attention_select(*case.arguments, 0.5, 0.5).keep.tolist() == [[0, 1, 2, 3, 4]]
    assert backend.topk_attention_select(*case.arguments, 1).keep.tolist() == [[0, 1, 4, -1, -1]]


def test_empty(backend):
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        case = attention(batch, (4, 2), None, length, 8, device=backend.device, types=[[QUERY] * length] * batch)
        for capacity in (None, 3):
            got = backend.dual_attention_select(*case.arguments, 0.1, 0.1, capacity=capacity)
            check_common(backend, case, got, [list(range(length))] * batch, capacity)
            got = backend.topk_attention_select(*case.arguments, 2, capacity=capacity)
            check_common(backend, case, got, [list(range(length))] * batch, capacity)


def test_nan_keeps_the_sequence(backend):
    case = attention(2, (4, 2), None, 20, 8, device=backend.device)
    case.q[0, 0, -1] = float("nan")
    case.types[0, -1] = QUERY
    got = backend.dual_attention_select(*case.arguments, 10.0, 10.0)
    assert int(got.counts[0]) == int((case.types[0] != PADDING).sum())
    assert int(got.counts[1]) == int(((case.types[1] != PADDING) & (case.types[1] != VISION)).sum())


def test_same_bits_every_run(backend, check_same_bits, dtype):
    case = attention(2, (4, 2), None, 130, 64, dtype=dtype, device=backend.device)
    check_same_bits(lambda: backend.dual_attention_select(*case.arguments, 0.01, 0.01, drop_multiple=4))
    check_same_bits(lambda: backend.topk_attention_select(*case.arguments, 30))


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "dual_attention_select": {**DENSE, **OPTIONS},
    "topk_attention_select": {**DENSE, **OPTIONS, "budget": {"negative": set_to(-1)}, "budgets": BUDGETS},
}
