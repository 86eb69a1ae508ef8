# SPDX-License-Identifier: Apache-2.0
"""spatial_merge. The tokens must follow from the assignment up to one rounding; the assignment must be the oracle's,
except for windows whose similarity is near the threshold or near the cut of the budget."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops import oracle
from ops.cases import f64
from ops.tolerance import MEAN_RTOL
from torch import Tensor

from .family import NEAR, Family
from .inputs import FLOATS, SEEDS, WIDTHS, Case, laid, layouts, normal, numbers


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(2, 3))
    window = draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    mode = draw(st.sampled_from(["threshold", "threshold", "uniform", "budget"]))
    if mode == "budget":  # windows tile the grid
        grid = [w * draw(st.integers(0, 3)) for w in window]
    else:
        grid = draw(st.lists(st.integers(0, 7), min_size=axes, max_size=axes))
    windows = math.prod(g // w for g, w in zip(grid, window, strict=True))
    most = windows if math.prod(window) > 1 else 0
    return {
        "batch": draw(st.integers(0, 3)),
        "grid": grid,
        "window": window,
        "prefix": draw(st.integers(0, 3)),
        "channels": draw(WIDTHS),
        "dtype": draw(FLOATS),
        "mode": mode,
        "budget": draw(st.integers(0, most)) if mode == "budget" else None,
        "merged_first": draw(st.booleans()),
        "threshold": draw(st.one_of(st.floats(-0.5, 1, width=32), st.sampled_from([0.0, 1.0, 0.8, -2.0, 2.0]))),
        "on": draw(st.one_of(st.none(), st.none(), st.integers(0, 2**16))),  # the threshold is a window's similarity
        "alike": draw(st.sampled_from([0.0, 0.5, 2.0])),
        "copies": draw(st.integers(0, 3)),  # windows that are copies of another one: exact ties
        "special": draw(
            st.sampled_from([None, None, None, "zero", "nan", "inf", "tiny", "large", "vanishing", "huge", "mixed"])
        ),
        "sizes": draw(st.sampled_from([None, None, "whole", "with zeros"])),
        "layouts": [draw(layouts(3)), draw(layouts(2))],
        "seed": draw(SEEDS),
    }


def _build(case: Case) -> dict[str, Any]:
    x = _tokens(case)
    threshold = case["threshold"]
    if case["on"] is not None and x.numel():
        members, _ = oracle.window_members(case["grid"], case["window"])
        window = members[case["on"] % len(members)] if members else []
        found = oracle.window_similarity(f64(x[0, [case["prefix"] + t for t in window]]))
        threshold = found if math.isfinite(found) else threshold
    sizes = None
    if case["sizes"] is not None:
        low = 0 if case["sizes"] == "with zeros" else 1
        sizes = torch.from_numpy(numbers(case["seed"], 2).integers(low, 9, x.shape[:2]).astype(np.float32))
        sizes = laid(sizes, case["layouts"][1])
    return {
        "x": laid(x, case["layouts"][0]),
        "grid": case["grid"],
        "window": case["window"],
        "threshold": threshold,
        "budget": case["budget"],
        "uniform": case["mode"] == "uniform",
        "num_prefix_tokens": case["prefix"],
        "sizes": sizes,
        "merged_first": case["merged_first"],
    }


_SCALES = {"tiny": 1e-3, "large": 100.0, "vanishing": 1e-25, "huge": 1e30}


def _tokens(case: Case) -> Tensor:
    """(B, P+N, C): noise with a variable common part; copies of windows; special values."""
    batch, prefix, length = case["batch"], case["prefix"], case["prefix"] + math.prod(case["grid"])
    x = normal((batch, length, case["channels"]), case["seed"], "float32")
    if length > prefix:
        x[:, prefix:] += case["alike"] * x[:, prefix : prefix + 1]
    members, whole = oracle.window_members(case["grid"], case["window"])
    full = [[prefix + t for t in m] for m, is_whole in zip(members, whole, strict=True) if is_whole]
    rng = numbers(case["seed"], 1)
    for _ in range(case["copies"] if len(full) > 1 else 0):
        source, target = rng.integers(0, len(full), 2)
        x[:, full[target]] = x[:, full[source]]
    if case["special"] in _SCALES:
        x *= _SCALES[case["special"]]
    elif case["special"] == "mixed":  # norms of all sizes
        x *= torch.from_numpy(2.0 ** rng.integers(-100, 124, (*x.shape[:2], 1))).float()
    elif case["special"] is not None and x.numel():
        b, t, c = (int(rng.integers(0, n)) for n in x.shape)
        if case["special"] == "zero":
            x[b, t] = 0
        else:
            x[b, t, c] = math.inf if case["special"] == "inf" else math.nan
    return x.to(getattr(torch, case["dtype"]))


# ---------------------------------------------------------------------------------------------- checks


def _check(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    x, sizes = arguments["x"], arguments["sizes"]
    if "want" not in memo:
        numbers_of = {**arguments, "x": f64(x), "sizes": None if sizes is None else f64(sizes)}
        with np.errstate(all="ignore"):
            memo["want"] = oracle.spatial_merge(**numbers_of)
        memo["members"], memo["whole"] = oracle.window_members(case["grid"], case["window"])
        memo["contents"] = _contents(x, case["prefix"], memo["members"])
    want: oracle.Merge = memo["want"]
    tokens, counts, assignment, out_sizes = answer
    assert tokens.dtype == x.dtype, f"tokens are {tokens.dtype}"
    assert (counts.dtype, assignment.dtype, out_sizes.dtype) == (torch.int32, torch.int64, torch.float32), "dtypes"
    assert tuple(tokens.shape) == want.tokens.shape, f"tokens have shape {tuple(tokens.shape)}"
    assert tuple(out_sizes.shape) == want.sizes.shape, f"sizes have shape {tuple(out_sizes.shape)}"
    assert tuple(assignment.shape) == want.assignment.shape, f"assignment has shape {tuple(assignment.shape)}"
    weight = np.ones(x.shape[:2]) if sizes is None else f64(sizes)
    for b in range(len(x)):
        _follows(
            f64(x[b]), weight[b], assignment[b].numpy(), int(counts[b]), f64(tokens[b]), f64(out_sizes[b]), x.dtype
        )
    if np.array_equal(assignment.numpy(), want.assignment):
        return False
    _explained(case, arguments["threshold"], memo, assignment.numpy())
    return True


def _contents(x: Tensor, prefix: int, members: list[list[int]]) -> list[list[bytes]]:
    """Bytes of each window per image, to identify equal windows."""
    flat = f64(x)
    return [[flat[b, [prefix + t for t in m]].tobytes() for m in members] for b in range(len(x))]


def _follows(x, weight, assignment, count: int, tokens, sizes, dtype: torch.dtype) -> None:
    """Check one image: rows are the weighted means of their tokens, and zero past the count."""
    assert sorted(set(assignment.tolist())) == list(range(count)), (
        f"rows {sorted(set(assignment.tolist()))}, count {count}"
    )
    assert (tokens[count:] == 0).all(), "tokens past counts are not zero"
    assert (sizes[count:] == 0).all(), "sizes past counts are not zero"
    info = torch.finfo(dtype)
    for row in range(count):
        group = np.flatnonzero(assignment == row)
        total = weight[group].sum()
        assert abs(sizes[row] - total) <= 1e-6 * total, f"row {row}: size {sizes[row]}, must be {total}"
        if len(group) == 1:
            assert np.array_equal(tokens[row], x[group[0]], equal_nan=True), f"row {row} is not its token"
            continue
        with np.errstate(all="ignore"):
            mean = (weight[group, None] * x[group]).sum(0) / total
            size = (weight[group, None] * np.abs(x[group])).sum(0) / total
            half = np.maximum(np.abs(mean), info.smallest_normal) * info.eps / 2
            off = np.abs(tokens[row] - mean) - (half * (1 + 1e-3) + MEAN_RTOL * size)
        finite = np.isfinite(mean)
        assert (off[finite] <= 0).all(), f"row {row}: {off[finite].max()} beyond one rounding"
        assert np.array_equal(tokens[row][~finite], mean[~finite], equal_nan=True), f"row {row}: not the IEEE result"


def _explained(case: Case, threshold: float, memo: dict[str, Any], assignment: np.ndarray) -> None:
    """Check that an assignment that differs from the oracle's is possible in float32."""
    members, prefix, similarity = memo["members"], case["prefix"], _ranked(memo["want"].similarity)
    limit = float(np.float32(threshold))
    merged = []
    for row in assignment:
        rows = [{int(row[prefix + t]) for t in m} for m in members]
        merged.append([w for w, m in enumerate(members) if len(m) > 1 and len(rows[w]) == 1])
    many = [w for w, m in enumerate(members) if len(m) > 1]
    whole = [w for w in many if memo["whole"][w]]
    if case["mode"] == "uniform":
        certain = min(int((s[whole] >= limit + _slack(limit)).sum()) for s in similarity)
        possible = min(int((s[whole] >= limit - _slack(limit)).sum()) for s in similarity)
        numbers_merged = {len(m) for m in merged}
        assert len(numbers_merged) == 1, f"images merge different numbers of windows: {numbers_merged}"
        assert certain <= len(merged[0]) <= possible, f"{len(merged[0])} windows merge, not {certain} to {possible}"
    for b, own in enumerate(merged):
        if case["mode"] == "threshold":
            wrong = [w for w in set(own) ^ set(memo["want"].merged[b]) if abs(similarity[b][w] - limit) > _slack(limit)]
            assert not wrong, f"image {b}: windows {wrong} differ from the oracle without being near"
        else:
            assert case["mode"] == "uniform" or len(own) == case["budget"], f"image {b}: {len(own)} windows merge"
            for w in own:
                for other in set(whole) - set(own):
                    _in_order(similarity[b], memo["contents"][b], w, other, f"image {b}")
        # A merged window takes the place of its first token; or merged windows come first, by descending similarity.
        standing = {w: int(assignment[b][prefix + members[w][0]]) for w in own}
        by_row = np.array([-standing.get(w, 0) for w in range(len(members))], dtype=np.float64)
        groups = oracle.output_order(members, own, by_row, prefix, assignment.shape[1], case["merged_first"])
        for row, group in enumerate(groups):
            assert (assignment[b][group] == row).all(), f"image {b}: tokens {group} must be row {row}"
        if case["merged_first"]:
            order = sorted(own, key=standing.__getitem__)
            for first, second in itertools.pairwise(order):
                _in_order(similarity[b], memo["contents"][b], first, second, f"image {b}")


def _ranked(similarity: np.ndarray) -> np.ndarray:
    """Similarities with NaN as the lowest."""
    return np.where(np.isnan(similarity), -1e9, similarity)


def _slack(value: float) -> float:
    return NEAR * max(abs(value), 1e-2)


def _in_order(similarity: np.ndarray, contents: list[bytes], first: int, second: int, where: str) -> None:
    """Check that the first window is at least as similar as the second, and has the lower index if they are equal."""
    ahead = similarity[first] - similarity[second]
    assert ahead >= -_slack(similarity[second]), f"{where}: window {second} should come before {first}"
    assert first < second or contents[first] != contents[second], (
        f"{where}: equal windows {second}, {first} out of order"
    )


FAMILIES = (Family("spatial_merge", _cases(), _build, _check),)
