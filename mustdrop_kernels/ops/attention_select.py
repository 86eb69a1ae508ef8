# SPDX-License-Identifier: Apache-2.0
"""Scores and selection in one call: composites of ``text_vision_scores`` and a selection (MustDrop, stage 2).

A backend that serves both parts serves the composite; a backend may override it by an implementation of its own.
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
    """Positions of the tokens that stay, and the scores that decided."""

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
    """Compute ``text_vision_scores`` and ``select_dual`` of its results in one call.

    MustDrop (arXiv 2411.10803), stage 2, dual-attention filtering: vision token j is dropped iff
    total[j] < global_threshold * sum(total) and peak[j] < individual_threshold and j is not protected. A composite of
    the two operators, served by every backend that serves both.

    Args:
        q: (B, Hq, Lq, D) float32, float16 or bfloat16, after RoPE: the last Lq positions of each sequence.
        k: (B, Hk, L, D) of q's dtype, after RoPE. Hq is a multiple of Hk, Lq <= L.
        token_types: (B, L) uint8, values of ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        global_threshold: share of the attention on all vision tokens; rounded to float32.
        individual_threshold: attention of a single text query; rounded to float32.
        protected: (B, L) bool, vision tokens that are never dropped; default: none.
        lse: (B, Hq, Lq) float32 with any strides, natural log-sum-exp of the scaled scores; saves a pass over the keys.
        capacity: number of columns of ``keep``; default: L. Where counts exceed it, ``keep`` is cut to it.
        drop_multiple: round the number of dropped tokens down to a multiple of this number, such as the page size of
            a cache: of the tokens to drop those with the highest ``total`` stay.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        keep (B, L or capacity) int64, ascending positions, -1 past counts; counts (B) int32;
        total and peak (B, L) float32, zero where the type is not VISION. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (q, k, token_types, scale, global_threshold, individual_threshold)
    options = {"protected": protected, "lse": lse, "capacity": capacity, "drop_multiple": drop_multiple}
    return ScoredSelection(*call("dual_attention_select", backend, *args, **options))


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
    """Compute ``text_vision_scores`` and ``select_topk`` of its total in one call.

    The alternative of a fixed budget to the thresholds of MustDrop (arXiv 2411.10803), stage 2. A composite of the two
    operators, served by every backend that serves both.

    Args:
        q: (B, Hq, Lq, D) float32, float16 or bfloat16, after RoPE: the last Lq positions of each sequence.
        k: (B, Hk, L, D) of q's dtype, after RoPE. Hq is a multiple of Hk, Lq <= L.
        token_types: (B, L) uint8, values of ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        budget: number of vision tokens of each sequence that stay, ``k`` of ``select_topk``.
        budgets: (B) int32, replaces ``budget`` for each sequence, without a synchronization with the device.
        protected: (B, L) bool, vision tokens that are never dropped; default: none.
        lse: (B, Hq, Lq) float32 with any strides, natural log-sum-exp of the scaled scores; saves a pass over the keys.
        capacity: number of columns of ``keep``; default: L. Where counts exceed it, ``keep`` is cut to it.
        drop_multiple: round the number of dropped tokens down to a multiple of this number, such as the page size of
            a cache: of the tokens to drop those with the highest ``total`` stay.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        keep (B, L or capacity) int64, ascending positions, -1 past counts; counts (B) int32;
        total and peak (B, L) float32, zero where the type is not VISION. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    options = {"protected": protected, "lse": lse, "capacity": capacity, "drop_multiple": drop_multiple}
    args = (q, k, token_types, scale, budget)
    return ScoredSelection(*call("topk_attention_select", backend, *args, budgets=budgets, **options))


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
