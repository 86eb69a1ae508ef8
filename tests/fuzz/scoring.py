# SPDX-License-Identifier: Apache-2.0
"""The operators on attention rows. Probabilities have the suite's tolerance; the fused operators' decisions must be the
oracle's on the scores that they return, and on the oracle's scores unless a decision is near."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ops import oracle
from ops.cases import VISION, f64, relative_gap
from ops.tolerance import assert_probabilities
from torch import Tensor

from . import selecting
from .family import NEAR, Family
from .inputs import (
    FLOATS,
    LENGTHS,
    SEEDS,
    WIDTHS,
    Case,
    dtype_of,
    integers,
    laid,
    layouts,
    normal,
    numbers,
    token_types,
    type_styles,
)

GAIN = 1.5
PLACES = st.sampled_from([None, None, None, None, "q", "k"])
"""Location of a NaN."""


@st.composite
def _attention(draw: st.DrawFn) -> Case:
    """Common part of all descriptions."""
    return {
        "dtype": draw(FLOATS),
        "heads": [draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 4, 0]))],  # of k; of q for each of them
        "dim": draw(WIDTHS),
        "scale": draw(st.sampled_from([None, None, None, 0.0, -0.3, 0.1])),  # None: 1 / sqrt(dim)
        "nan": draw(PLACES),
        "exponent": draw(st.sampled_from([None, None, None, -60, 5, 12, 50])),  # of whole vectors times 2^exponent
        "seed": draw(SEEDS),
    }


def _vectors(shape: Sequence[int], case: Case, stream: int = 0) -> Tensor:
    """Gaussian, or whole numbers times a power of two: of any size, their scores are exact in float32."""
    exponent = case.get("exponent")
    if exponent is None:
        return normal(shape, case["seed"] + stream, case["dtype"], GAIN)
    most = -60 if case.get("lse") else 12 if case["dtype"] == "float16" else exponent  # a given lse is rounded
    exponent = min(exponent, most)
    whole = numbers(case["seed"] + stream).integers(-3, 4, tuple(shape))
    return torch.from_numpy(whole * 2.0**exponent).to(dtype_of(case["dtype"]))


def _scale(case: Case) -> float:
    if case.get("exponent") is not None:
        return 0.25
    return 1 / math.sqrt(max(1, case["dim"])) if case["scale"] is None else case["scale"]


def _with_nan(q: Tensor, k: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    for name, t in (("q", q), ("k", k)):
        if case["nan"] == name and t.numel():
            t.view(-1)[numbers(case["seed"], 3).integers(0, t.numel())] = math.nan
    return q, k


def _numbers(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else f64(t)


# ---------------------------------------------------------------------------------------------- cls_attention


@st.composite
def _cls_cases(draw: st.DrawFn) -> Case:
    batch, span = draw(st.integers(0, 3)), draw(LENGTHS)
    return {
        **draw(_attention()),
        "batch": batch,
        "span": span,
        "layouts": [draw(layouts(3)), draw(layouts(4))],
        "counts": draw(
            st.one_of(st.none(), st.lists(st.integers(-3, span + 5), min_size=batch, max_size=batch)),
        ),
        "prefix": draw(st.sampled_from([0, 1, 1, 2, 5, 200])),
    }


def _build_cls(case: Case) -> dict[str, Any]:
    heads = math.prod(case["heads"])
    q = _vectors((case["batch"], heads, case["dim"]), case)
    k = _vectors((case["batch"], heads, case["span"], case["dim"]), case, 1)
    q, k = _with_nan(q, k, case)
    return {
        "q": laid(q, case["layouts"][0]),
        "k": laid(k, case["layouts"][1]),
        "scale": _scale(case),
        "counts": None if case["counts"] is None else integers(case["counts"], shape=(case["batch"],)),
        "num_prefix_tokens": case["prefix"],
    }


def _check_cls(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    if "want" not in memo:
        counts = arguments["counts"]
        memo["want"] = oracle.cls_attention(
            f64(arguments["q"]), f64(arguments["k"]), arguments["scale"], selecting.array(counts), case["prefix"]
        )
    assert_probabilities(answer[0], memo["want"], "attention")
    return False


# ---------------------------------------------------------------------------------------------- dense


@st.composite
def _dense_cases(draw: st.DrawFn) -> Case:
    length = draw(LENGTHS)
    return {
        **draw(_attention()),
        "batch": draw(st.integers(0, 3)),
        "length": length,
        "rows": draw(st.one_of(st.just(length), st.integers(0, length))),
        "types": draw(type_styles()),
        "layouts": [draw(layouts(4)), draw(layouts(4)), draw(layouts(2))],
        "lse": draw(st.sampled_from([None, None, "given", "strided", "minus infinity"])),
    }


def _build_dense(case: Case) -> dict[str, Any]:
    batch, (kv_heads, group), dim = case["batch"], case["heads"], case["dim"]
    q = _vectors((batch, kv_heads * group, case["rows"], dim), case)
    k = _vectors((batch, kv_heads, case["length"], dim), case, 1)
    q, k = _with_nan(q, k, case)
    q, k = laid(q, case["layouts"][0]), laid(k, case["layouts"][1])
    types = laid(token_types(batch, case["length"], case["types"]), case["layouts"][2])
    return {"q": q, "k": k, "token_types": types, "scale": _scale(case), "lse": _lse(case, q, k, types)}


def _lse(case: Case, q: Tensor, k: Tensor, types: Tensor) -> Tensor | None:
    """(B, Hq, Lq): the true normalizers; some set to -inf, as of a row without visible keys."""
    if case["lse"] is None:
        return None
    rows = [oracle.log_sum_exp(f64(q[b]), f64(k[b]), types[b].numpy(), _scale(case)) for b in range(len(q))]
    lse = torch.from_numpy(np.array(rows).reshape(q.shape[:3])).float()
    if case["lse"] == "minus infinity":
        lse[torch.from_numpy(numbers(case["seed"], 4).random(tuple(lse.shape)) < 0.2)] = -math.inf
    if case["lse"] == "strided" and lse.numel():
        return lse.repeat_interleave(3, dim=2)[..., ::3]
    return lse


def _dense_scores(arguments: dict[str, Any], memo: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if "scores" not in memo:
        memo["scores"] = oracle.text_vision_scores(
            f64(arguments["q"]),
            f64(arguments["k"]),
            arguments["token_types"].numpy(),
            arguments["scale"],
            _numbers(arguments["lse"]),
        )
    return memo["scores"]


def _same_scores(answer: list[Tensor], scores: tuple[np.ndarray, np.ndarray]) -> None:
    assert_probabilities(answer[0], scores[0], "total")
    assert_probabilities(answer[1], scores[1], "peak")


def _check_dense(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    _same_scores(answer, _dense_scores(arguments, memo))
    return False


@st.composite
def _map_cases(draw: st.DrawFn) -> Case:
    return {**draw(_dense_cases()), "max_query": draw(st.integers(0, 20))}


def _build_map(case: Case) -> dict[str, Any]:
    return {**_build_dense(case), "max_query": case["max_query"]}


def _check_map(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    if "want" not in memo:
        memo["want"] = oracle.text_vision_attention(
            f64(arguments["q"]),
            f64(arguments["k"]),
            arguments["token_types"].numpy(),
            arguments["scale"],
            case["max_query"],
            _numbers(arguments["lse"]),
        )
    assert_probabilities(answer[0], memo["want"], "map")
    return False


# ---------------------------------------------------------------------------------------------- fused


@st.composite
def _fused_cases(draw: st.DrawFn, dual: bool) -> Case:
    case = {**draw(_dense_cases()), "options": draw(selecting.options())}
    if dual:
        return {**case, "thresholds": draw(selecting.dual_thresholds())}
    budgets = st.lists(selecting.BUDGETS, min_size=case["batch"], max_size=case["batch"])
    return {**case, "budget": draw(st.integers(0, 70)), "budgets": draw(st.one_of(st.none(), budgets))}


def _build_fused(case: Case) -> dict[str, Any]:
    arguments = {
        **_build_dense(case),
        **selecting.build_options(case["options"], case["batch"], case["length"]),
    }
    if "thresholds" not in case:
        budgets = None if case["budgets"] is None else integers(case["budgets"], shape=(case["batch"],))
        return {**arguments, "budget": case["budget"], "budgets": budgets}
    # A threshold "on a value" is the oracle's value rounded to float32.
    on = case["thresholds"]["on"] is not None
    total, peak = _dense_scores(arguments, {}) if on else (np.zeros((0, 0)), np.zeros((0, 0)))
    limits = selecting.build_thresholds(case["thresholds"], total, peak)
    return {**arguments, "global_threshold": limits[0], "individual_threshold": limits[1]}


def _check_fused_topk(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    scores = _dense_scores(arguments, memo)
    _same_scores(answer[2:], scores)
    own = selecting.topk_kept(f64(answer[2]), arguments, case["budget"])
    capacity = case["length"] if case["options"]["capacity"] is None else case["options"]["capacity"]
    selecting.same_selection(answer, own, capacity)
    if "want" not in memo:
        memo["want"] = selecting.topk_kept(scores[0], arguments, case["budget"])
        memo["near"] = _order_is_near(scores[0], arguments["token_types"].numpy())
    if own == memo["want"]:
        return False
    assert memo["near"], "decisions differ from those on the oracle's scores without being near"
    return True


def _order_is_near(total: np.ndarray, types: np.ndarray) -> bool:
    """True if float32 may swap two vision tokens of a row; also for ties, which are sums of different terms."""
    for b, row in enumerate(total):
        ranked = np.sort(row[types[b] == VISION])
        ranked = ranked[np.isfinite(ranked)]
        if any(relative_gap(a, b) < NEAR for a, b in itertools.pairwise(ranked)):
            return True
    return False


def _check_fused_dual(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    scores, described = _dense_scores(arguments, memo), case["options"]
    types, multiple = arguments["token_types"].numpy(), case["options"]["drop_multiple"]
    capacity = case["length"] if described["capacity"] is None else described["capacity"]
    _same_scores(answer[2:], scores)
    total, peak = f64(answer[2]), f64(answer[3])
    own, own_near = selecting.dual_kept(total, peak, arguments, multiple), selecting.near_total(total, peak, arguments)
    if any(own_near):
        selecting.check_near(answer, own, own_near, types, described)
        return True
    selecting.same_selection(answer, own, capacity)
    if "want" not in memo:
        memo["want"] = selecting.dual_kept(*scores, arguments, multiple)
        memo["near"] = _threshold_is_near(*scores, arguments)
    if own == memo["want"]:
        return False
    near_order = multiple > 1 and _order_is_near(scores[0], types)
    assert memo["near"] or near_order, "decisions differ from those on the oracle's scores without being near"
    return True


def _threshold_is_near(total: np.ndarray, peak: np.ndarray, arguments: dict[str, Any]) -> bool:
    """True if a vision token's total or peak is near its threshold; two exact zeros are not."""
    individual = float(np.float32(arguments["individual_threshold"]))
    for b, types in enumerate(arguments["token_types"].numpy()):
        with np.errstate(all="ignore"):
            limit = float(np.float32(arguments["global_threshold"]) * total[b].sum())
        for j in np.flatnonzero(types == VISION):
            for x, y in ((total[b, j], limit), (peak[b, j], individual)):
                if (x != 0 or y != 0) and np.isfinite([x, y]).all() and relative_gap(x, y) < NEAR:
                    return True
    return False


# ---------------------------------------------------------------------------------------------- packed


@st.composite
def _packed_lengths(draw: st.DrawFn) -> list[list[int]]:
    """(length_q, length_k) of each sequence; a sequence may have more rows than keys."""
    return draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)).map(list), max_size=4))


@st.composite
def _bad_bounds(draw: st.DrawFn, entries: int) -> list[list[int]]:
    """[index, value]: cumulative lengths that decrease or exceed the tensors."""
    if draw(st.integers(0, 4)):
        return []
    value = st.sampled_from([0, 1, 5, 99, -5, 2**31 - 1, -(2**31)])
    return draw(st.lists(st.tuples(st.integers(0, entries - 1), value).map(list), min_size=1, max_size=2))


@st.composite
def _varlen_cases(draw: st.DrawFn) -> Case:
    lengths = draw(_packed_lengths())
    return {
        **draw(_attention()),
        "lengths": lengths,
        "types": draw(type_styles()),
        "layouts": [draw(layouts(3)), draw(layouts(3)), draw(layouts(1))],
        "bad_q": draw(_bad_bounds(len(lengths) + 1)),
        "bad_k": draw(_bad_bounds(len(lengths) + 1)),
        "margins": [draw(st.integers(0, 3)), draw(st.integers(0, 3))],  # unused rows around the packed ones
        "bound": draw(st.sampled_from(["exact", "exact", "large", "small"])),
        "lse": draw(st.booleans()),
    }


def _bounds(lengths: list[int], margin: int, bad: list[list[int]]) -> Tensor:
    bounds = np.cumsum([margin, *lengths])
    for place, value in bad:
        bounds[place] = value
    return integers(bounds.tolist())


def _longest(bounds: Tensor, extent: int, bound: str) -> int:
    exact = max((b - a for a, b in oracle.spans(bounds.numpy(), extent)), default=0)
    return {"exact": exact, "large": exact + 1000, "small": exact // 2}[bound]


def _build_varlen(case: Case) -> dict[str, Any]:
    (kv_heads, group), dim, margins = case["heads"], case["dim"], case["margins"]
    total_q = sum(q for q, _ in case["lengths"]) + 2 * margins[0]
    total_k = sum(k for _, k in case["lengths"]) + 2 * margins[1]
    q = _vectors((total_q, kv_heads * group, dim), case)
    k = _vectors((total_k, kv_heads, dim), case, 1)
    q, k = _with_nan(q, k, case)
    cu_q = _bounds([q for q, _ in case["lengths"]], margins[0], case["bad_q"])
    cu_k = _bounds([k for _, k in case["lengths"]], margins[1], case["bad_k"])
    lse = None
    if case["lse"]:  # any normalizer is valid
        lse = 2 + normal((kv_heads * group, total_q), case["seed"] + 2, "float32")
    return {
        "q": laid(q, case["layouts"][0]),
        "k": laid(k, case["layouts"][1]),
        "token_types": laid(token_types(1, total_k, case["types"])[0], case["layouts"][2]),
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": _longest(cu_q, total_q, case["bound"]),
        "max_seqlen_k": _longest(cu_k, total_k, case["bound"]),
        "scale": _scale(case),
        "lse": lse,
    }


def _check_varlen(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    types = arguments["token_types"].numpy()
    spans = oracle.spans(arguments["cu_seqlens_k"].numpy(), len(types))
    taken = np.zeros(len(types), dtype=np.int64)
    for begin, end in spans:
        taken[begin:end] += 1
    _forms(answer, (len(types),), types)
    if case["bound"] == "small" or (taken > 1).any():
        return False  # not upper bounds; or two sequences overlap
    if "want" not in memo:
        memo["want"] = oracle.text_vision_scores_varlen(
            f64(arguments["q"]),
            f64(arguments["k"]),
            types,
            arguments["cu_seqlens_q"].numpy(),
            arguments["cu_seqlens_k"].numpy(),
            arguments["scale"],
            _numbers(arguments["lse"]),
        )
    _same_scores(answer, memo["want"])
    return False


def _forms(answer: list[Tensor], shape: tuple[int, ...], types: np.ndarray) -> None:
    """Check properties that hold for any bounds: shapes, dtypes, and zeros except at vision tokens."""
    for name, t in zip(("total", "peak"), answer, strict=True):
        assert t.dtype == torch.float32, f"{name} is {t.dtype}"
        assert tuple(t.shape) == shape, f"{name} has shape {tuple(t.shape)}"
        assert (t.numpy()[types != VISION] == 0).all(), f"{name} is not zero where there is no vision token"


# ---------------------------------------------------------------------------------------------- paged


@st.composite
def _paged_cases(draw: st.DrawFn) -> Case:
    lengths = draw(_packed_lengths())
    batch = len(lengths)
    bad_length = st.sampled_from([None, None, None, None, -4, 99, 0, 2**31 - 1, -(2**31)])
    return {
        **draw(_attention()),
        "lengths": lengths,
        "slots": draw(st.sampled_from([1, 2, 3, 4, 5, 16])),
        "spare": draw(st.integers(0, 3)),
        "wider": draw(st.integers(0, 6)),  # columns of token_types past the longest sequence
        "columns": draw(st.integers(0, 2)),  # of the table, beyond those that are needed
        "bad_blocks": draw(st.lists(st.sampled_from([-1, 10**6, -(2**31), 2**31 - 1]), max_size=2)),
        "seq_lens": draw(st.lists(bad_length, min_size=batch, max_size=batch)),
        "types": draw(type_styles()),
        "layouts": [draw(layouts(3)), draw(layouts(4, last=False)), draw(layouts(2)), draw(layouts(2))],
        "bad_q": draw(_bad_bounds(batch + 1)),
        "bound": draw(st.sampled_from(["exact", "exact", "large", "small"])),
        "lse": draw(st.booleans()),
    }


def _build_paged(case: Case) -> dict[str, Any]:
    (kv_heads, group), dim, slots = case["heads"], case["dim"], case["slots"]
    batch, rng = len(case["lengths"]), numbers(case["seed"], 7)
    longest = max((k for _, k in case["lengths"]), default=0)
    needed = [-(-k // slots) for _, k in case["lengths"]]
    order = rng.permutation(sum(needed) + case["spare"])
    table = np.full((batch, -(-longest // slots) + case["columns"]), -7, dtype=np.int64)
    used = 0
    for b, n in enumerate(needed):
        table[b, :n] = order[used : used + n]
        used += n
    for bad in case["bad_blocks"]:
        if table.size:
            table[tuple(rng.integers(0, table.shape))] = bad
    given = zip(case["seq_lens"], case["lengths"], strict=True)
    seq_lens = [k if bad is None else bad for bad, (_, k) in given]
    total_q = sum(q for q, _ in case["lengths"])
    q = _vectors((total_q, kv_heads * group, dim), case)
    cache = _vectors((len(order), slots, kv_heads, dim), case, 1)
    q, cache = _with_nan(q, cache, case)
    cu_q = _bounds([q for q, _ in case["lengths"]], 0, case["bad_q"])
    lse = 2 + normal((kv_heads * group, total_q), case["seed"] + 2, "float32") if case["lse"] else None
    types = token_types(batch, longest + case["wider"], case["types"])
    return {
        "q": laid(q, case["layouts"][0]),
        "k_cache": laid(cache, case["layouts"][1]),
        "block_table": laid(torch.from_numpy(table.astype(np.int32)), case["layouts"][2]),
        "seq_lens": integers(seq_lens, shape=(batch,)),
        "token_types": laid(types, case["layouts"][3]),
        "cu_seqlens_q": cu_q,
        "max_seqlen_q": _longest(cu_q, total_q, case["bound"]),
        "scale": _scale(case),
        "lse": lse,
    }


def _check_paged(case: Case, arguments: dict[str, Any], memo: dict[str, Any], answer: list[Tensor]) -> bool:
    types = arguments["token_types"].numpy()
    _forms(answer, types.shape, types)
    if case["bound"] == "small":
        return False
    if "want" not in memo:
        memo["want"] = oracle.text_vision_scores_paged(
            f64(arguments["q"]),
            f64(arguments["k_cache"]),
            arguments["block_table"].numpy(),
            arguments["seq_lens"].numpy(),
            types,
            arguments["cu_seqlens_q"].numpy(),
            arguments["scale"],
            _numbers(arguments["lse"]),
        )
    _same_scores(answer, memo["want"])
    return False


FAMILIES = (
    Family("cls_attention", _cls_cases(), _build_cls, _check_cls),
    Family("text_vision_scores", _dense_cases(), _build_dense, _check_dense),
    Family("text_vision_scores_varlen", _varlen_cases(), _build_varlen, _check_varlen),
    Family("text_vision_scores_paged", _paged_cases(), _build_paged, _check_paged),
    Family("text_vision_attention", _map_cases(), _build_map, _check_map),
    Family("dual_attention_select", _fused_cases(True), _build_fused, _check_fused_dual),
    Family("topk_attention_select", _fused_cases(False), _build_fused, _check_fused_topk),
)
