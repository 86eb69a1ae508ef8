# SPDX-License-Identifier: Apache-2.0
"""Scores and selection in one call: composites of ``text_vision_scores`` and a selection.

A backend that serves both parts serves the composite; one with a fused kernel overrides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .contract import Call, define
from .dispatch import call
from .scores import check_dense, fake_scores
from .select import check_budget, check_options, fake_selection

__all__ = ["ScoredSelection", "dual_attention_select", "topk_attention_select"]

Find = Callable[[str], Callable[..., Any]]
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class ScoredSelection(NamedTuple):
    """A selection and the scores that it is based on."""

    keep: Tensor  # (B, L or capacity) int64, ascending, -1 past counts
    counts: Tensor  # (B) int32
    total: Tensor  # (B, L) float32
    peak: Tensor  # (B, L) float32


def dual_attention_select(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,
    lse: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
    backend: str | None = None,
) -> ScoredSelection:
    """``text_vision_scores`` and ``select_dual`` in one call, with the arguments and results of both."""
    args = (q, k, token_types, scale, global_threshold, individual_threshold)
    options = {"protected": protected, "lse": lse, "capacity": capacity, "drop_multiple": drop_multiple}
    return ScoredSelection(*call("dual_attention_select", backend, q, *args, **options))


def topk_attention_select(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    budget: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    lse: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
    backend: str | None = None,
) -> ScoredSelection:
    """``text_vision_scores`` and ``select_topk`` by its total in one call; ``budget`` is select_topk's k."""
    options = {"protected": protected, "lse": lse, "capacity": capacity, "drop_multiple": drop_multiple}
    args = (q, k, token_types, scale, budget)
    return ScoredSelection(*call("topk_attention_select", backend, q, *args, budgets=budgets, **options))


def _check_dual(a: Call) -> None:
    check_options(check_dense(a), a)


def _check_topk(a: Call) -> None:
    check = check_dense(a)
    check_budget(check, "budget", a.budget, a)
    check_options(check, a)


def _fake(a: Call) -> Results:
    return (*fake_selection(a), *fake_scores(a))


def _options(a: Call) -> dict[str, Any]:
    return {"protected": a.protected, "capacity": a.capacity, "drop_multiple": a.drop_multiple}


def _dual(find: Find, a: Call) -> Results:
    total, peak = find("text_vision_scores")(a.q, a.k, a.token_types, a.scale, lse=a.lse)
    thresholds = (a.global_threshold, a.individual_threshold)
    keep, counts = find("select_dual")(total, peak, a.token_types, *thresholds, **_options(a))
    return keep, counts, total, peak


def _topk(find: Find, a: Call) -> Results:
    total, peak = find("text_vision_scores")(a.q, a.k, a.token_types, a.scale, lse=a.lse)
    keep, counts = find("select_topk")(total, a.token_types, a.budget, budgets=a.budgets, **_options(a))
    return keep, counts, total, peak


define(dual_attention_select, _check_dual, _fake, composite=_dual, parts=("text_vision_scores", "select_dual"))
define(topk_attention_select, _check_topk, _fake, composite=_topk, parts=("text_vision_scores", "select_topk"))
