# SPDX-License-Identifier: Apache-2.0
"""select_dual and select_topk. Top-k and the threshold on `peak` only compare and are exact. The threshold on `total`
is multiplied by a sum: near it, float32 may decide either way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops import oracle
from ops.cases import VISION, f64
from torch import Tensor

from .family import NEAR, Family
from .inputs import (
    FLOATS,
    LENGTHS,
    SEEDS,
    Case,
    integers,
    laid,
    layouts,
    protected_of,
    token_types,
    type_styles,
    value_styles,
    values,
)

CAPACITIES = st.one_of(st.none(), st.integers(0, 70))
MULTIPLES = st.one_of(st.just(1), st.integers(1, 20), st.sampled_from([64, 1000, 2**31, 2**62]))
BUDGETS = st.integers(-2, 70)


@st.composite
def options(draw: st.DrawFn) -> Case:
    """Common options of the selections."""
    return {
        "protected": draw(st.one_of(st.none(), SEEDS)),
        "capacity": draw(CAPACITIES),
        "drop_multiple": draw(MULTIPLES),
    }


def build_options(described: Case, batch: int, length: int) -> dict[str, Any]:
    """The arguments `protected`, `capacity` and `drop_multiple`."""
    return {**described, "protected": protected_of(batch, length, described["protected"])}


def array(t: Tensor | None) -> np.ndarray | None:
    """Array for the oracle."""
    return None if t is None else t.numpy()


def same_selection(answer: list[Tensor], kept: list[list[int]], capacity: int) -> None:
    """Check keep and counts of an answer."""
    keep, counts = oracle.as_keep(kept, capacity)
    assert answer[0].dtype == torch.int64, f"keep is {answer[0].dtype}"
    assert answer[1].dtype == torch.int32, f"counts is {answer[1].dtype}"
    assert tuple(answer[0].shape) == keep.shape, f"keep has shape {tuple(answer[0].shape)}"
    assert answer[1].tolist() == counts.tolist(), f"counts {answer[1].tolist()}, must be {counts.tolist()}"
    assert answer[0].tolist() == keep.tolist(), f"keep {answer[0].tolist()}, must be {keep.tolist()}"


# ---------------------------------------------------------------------------------------------- select_topk


@st.composite
def _topk_cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(0, 3))
    return {
        "batch": batch,
        "length": draw(LENGTHS),
        "dtype": draw(FLOATS),
        "layout": draw(layouts(2)),
        "types": draw(type_styles()),
        "types_layout": draw(layouts(2)),
        "values": draw(value_styles()),
        "k": draw(st.one_of(st.integers(0, 70), st.sampled_from([2**31, 2**62]))),
        "budgets": draw(st.one_of(st.none(), st.lists(BUDGETS, min_size=batch, max_size=batch))),
        "options": draw(options()),
    }


def _build_topk(case: Case) -> dict[str, Any]:
    batch, length = case["batch"], case["length"]
    return {
        "scores": laid(values((batch, length), case["values"], case["dtype"]), case["layout"]),
        "token_types": laid(token_types(batch, length, case["types"]), case["types_layout"]),
        "k": case["k"],
        "budgets": None if case["budgets"] is None else integers(case["budgets"], shape=(batch,)),
        **build_options(case["options"], batch, length),
    }


def topk_kept(scores: np.ndarray, arguments: dict[str, Any], k: int) -> list[list[int]]:
    """The oracle's decision on these scores."""
    budgets = arguments["budgets"]
    return oracle.select_topk(
        scores,
        arguments["token_types"].numpy(),
        k,
        None if budgets is None else budgets.tolist(),
        array(arguments["protected"]),
        arguments["drop_multiple"],
    )


def _check_topk(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    if "want" not in memo:
        memo["want"] = topk_kept(f64(arguments["scores"]), arguments, case["k"])
    capacity = case["options"]["capacity"]
    same_selection(answer, memo["want"], case["length"] if capacity is None else capacity)
    return False


# ---------------------------------------------------------------------------------------------- select_dual

THRESHOLDS = st.one_of(
    st.integers(0, 64).map(lambda n: n / 256),  # times a sum of small integers: exact
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, -1.0, 1.0, 2.0, 0.001, 0.0012, 0.011, 1e-40]),
    st.sampled_from(["inf", "nan"]),
)
"""Infinity and NaN by name, which JSON lacks."""


@st.composite
def dual_thresholds(draw: st.DrawFn) -> Case:
    """Two thresholds; or `on`: the indices of values that they are equal to."""
    return {
        "global": draw(THRESHOLDS),
        "individual": draw(THRESHOLDS),
        "on": draw(st.one_of(st.none(), st.lists(st.integers(0, 2**16), min_size=2, max_size=2))),
    }


def build_thresholds(described: Case, total: np.ndarray, peak: np.ndarray) -> tuple[float, float]:
    """The thresholds. One `on` a value equals that value (peak), or that value's share of its row's sum (total)."""
    thresholds = float(described["global"]), float(described["individual"])
    if described["on"] is None or not total.size:
        return thresholds
    (row, column), place = np.unravel_index(described["on"][0] % total.size, total.shape), described["on"][1]
    with np.errstate(all="ignore"):
        share = float(total[row, column] / total[row].sum())
    return share, float(peak.flat[place % peak.size])


@st.composite
def _dual_cases(draw: st.DrawFn) -> Case:
    return {
        "batch": draw(st.integers(0, 3)),
        "length": draw(LENGTHS),
        "dtype": draw(FLOATS),
        "layouts": draw(st.lists(layouts(2), min_size=3, max_size=3)),
        "types": draw(type_styles()),
        "total": draw(value_styles()),
        "peak": draw(value_styles()),
        "thresholds": draw(dual_thresholds()),
        "options": draw(options()),
    }


def _build_dual(case: Case) -> dict[str, Any]:
    batch, length = case["batch"], case["length"]
    total, peak = (values((batch, length), case[name], case["dtype"]) for name in ("total", "peak"))
    if case["total"]["style"] == "special":
        total = torch.where(total.abs() > 1e30, torch.sign(total) * torch.inf, total)  # avoids overflow of float32 sums
    total, peak = laid(total, case["layouts"][0]), laid(peak, case["layouts"][1])
    limits = build_thresholds(case["thresholds"], f64(total), f64(peak))
    return {
        "total": total,
        "peak": peak,
        "token_types": laid(token_types(batch, length, case["types"]), case["layouts"][2]),
        "global_threshold": limits[0],
        "individual_threshold": limits[1],
        **build_options(case["options"], batch, length),
    }


def dual_kept(total: np.ndarray, peak: np.ndarray, arguments: dict[str, Any], drop_multiple: int) -> list[list[int]]:
    """The oracle's decision on these scores."""
    with np.errstate(all="ignore"):
        return oracle.select_dual(
            total,
            peak,
            arguments["token_types"].numpy(),
            arguments["global_threshold"],
            arguments["individual_threshold"],
            array(arguments["protected"]),
            drop_multiple,
        )


def near_total(total: np.ndarray, peak: np.ndarray, arguments: dict[str, Any]) -> list[set[int]]:
    """Per row the vision tokens whose total is so near to its limit that float32 may decide either way.

    Exact values (integers whose sum and product float32 represents) are never near, nor are tokens that `peak` keeps.
    """
    share = float(np.float32(arguments["global_threshold"]))
    decided = (arguments["token_types"].numpy() == VISION) & (peak < np.float32(arguments["individual_threshold"]))
    if arguments["protected"] is not None:
        decided &= ~arguments["protected"].numpy()
    near: list[set[int]] = []
    for b, row in enumerate(total):
        with np.errstate(all="ignore"):
            limit = share * float(row.sum())
            exact = _whole(row) and np.abs(row).sum() < 2**24 and float(np.float32(limit)) == limit
        if exact or not np.isfinite(limit):
            near.append(set())
            continue
        # The error of a sum of terms of both signs is relative to the magnitudes of its terms.
        slack = NEAR * max(abs(limit), abs(share) * float(np.abs(row).sum()))
        near.append({int(j) for j in np.flatnonzero(decided[b]) if abs(row[j] - limit) <= slack})
    return near


def _whole(row: np.ndarray) -> bool:
    return bool(np.isfinite(row).all() and (row == np.rint(row)).all())


def check_near(answer: list[Tensor], kept: list[list[int]], near: list[set[int]], types: np.ndarray, case: Case):
    """Check that decisions differ only for near tokens, and the properties that do not depend on them."""
    multiple, capacity = case["drop_multiple"], case["capacity"]
    counts = answer[1].tolist()
    for b, expected in enumerate(kept):
        real = int((types[b] != 0).sum())
        assert (real - counts[b]) % multiple == 0, f"row {b}: {real - counts[b]} are dropped, not a multiple"
        got = [j for j in answer[0][b].tolist() if j >= 0]
        assert got == sorted(set(got)), f"row {b}: keep does not ascend"
        if multiple == 1 and (capacity is None or capacity >= len(types[b])):
            wrong = set(got) ^ set(expected)
            assert wrong <= near[b], f"row {b}: differs from the oracle without being near: {sorted(wrong - near[b])}"


def _check_dual(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    described, total = case["options"], f64(arguments["total"])
    if "want" not in memo:
        peak = f64(arguments["peak"])
        memo["want"] = dual_kept(total, peak, arguments, described["drop_multiple"])
        memo["near"] = near_total(total, peak, arguments)
    if any(memo["near"]):
        check_near(answer, memo["want"], memo["near"], arguments["token_types"].numpy(), described)
        return True
    capacity = described["capacity"]
    same_selection(answer, memo["want"], case["length"] if capacity is None else capacity)
    return False


FAMILIES = (
    Family("select_dual", _dual_cases(), _build_dual, _check_dual),
    Family("select_topk", _topk_cases(), _build_topk, _check_topk),
)
