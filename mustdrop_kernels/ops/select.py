# SPDX-License-Identifier: Apache-2.0
"""Selection of the vision tokens to keep, by two thresholds or by a budget (MustDrop, stage 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .contract import Call, define
from .dispatch import call

__all__ = ["Selection", "select_dual", "select_topk"]


class Selection(NamedTuple):
    """Kept tokens."""

    keep: Tensor  # (B, L or capacity) int64, ascending, -1 past counts
    counts: Tensor  # (B) int32


def select_dual(
    total: Tensor,
    peak: Tensor,
    token_types: Tensor,
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
    backend: str | None = None,
) -> Selection:
    """Drop vision token j iff total[j] < global_threshold * sum(total) and peak[j] < individual_threshold.

    Text is kept, padding is dropped, protected vision tokens are kept.

    Args:
        total: (B, L) float, see ``text_vision_scores``.
        peak: (B, L), of total's dtype.
        token_types: (B, L) uint8.
        global_threshold: share of the sum of ``total``, rounded to float32.
        individual_threshold: bound of ``peak``, the attention of a single row; rounded to float32.
        protected: (B, L) bool, vision tokens that are never dropped.
        capacity: length of ``keep``; default L. If counts exceed it, ``keep`` holds the first ``capacity``.
        drop_multiple: keep the best (by total) of the tokens to drop until the number of dropped tokens is a multiple
            of this; for paged caches, so that whole blocks are freed.
        backend: name of an explicit backend.

    Returns:
        keep (B, L or capacity) int64, ascending, -1 past counts; counts (B) int32.
    """
    args = (total, peak, token_types, global_threshold, individual_threshold)
    options = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*call("select_dual", backend, total, *args, **options))


def select_topk(
    scores: Tensor,
    token_types: Tensor,
    k: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
    backend: str | None = None,
) -> Selection:
    """Keep k vision tokens: the protected ones first, then those with the highest scores.

    All protected vision tokens are kept, even if they exceed k. Text is kept, padding is dropped.

    Args:
        scores: (B, L) float.
        token_types: (B, L) uint8.
        k: vision tokens to keep per sequence.
        budgets: (B) int32, replaces k per sequence, without synchronizing with the device.
        protected: (B, L) bool.
        capacity: length of ``keep``; default L.
        drop_multiple: keep the best of the tokens to drop until the number of dropped tokens is a multiple of this.
        backend: name of an explicit backend.

    Returns:
        keep (B, L or capacity) int64, ascending, -1 past counts; counts (B) int32.
    """
    options = {"budgets": budgets, "protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*call("select_topk", backend, scores, scores, token_types, k, **options))


def check_options(check: Checker, a: Call) -> None:
    """Check protected, capacity and drop_multiple."""
    if a.protected is not None:
        check.tensor("protected", a.protected, tuple(a.token_types.shape), (torch.bool,))
    if a.capacity is not None:
        check.at_least("capacity", a.capacity, 0)
    check.at_least("drop_multiple", a.drop_multiple, 1)


def check_budget(check: Checker, argument: str, k: int, a: Call) -> None:
    """Check the number of tokens to keep and budgets."""
    check.at_least(argument, k, 0)
    if a.budgets is not None:
        check.tensor("budgets", a.budgets, (a.token_types.shape[0],), (torch.int32,), any_strides=True)


def _check_dual(a: Call) -> None:
    check = Checker(a, a.total)
    check.tensor("total", a.total, ("B", "L"), FLOATS)
    check.tensor("peak", a.peak, tuple(a.total.shape), (a.total.dtype,))
    check.tensor("token_types", a.token_types, tuple(a.total.shape), (torch.uint8,))
    check_options(check, a)


def _check_topk(a: Call) -> None:
    check = Checker(a, a.scores)
    check.tensor("scores", a.scores, ("B", "L"), FLOATS)
    check.tensor("token_types", a.token_types, tuple(a.scores.shape), (torch.uint8,))
    check_budget(check, "k", a.k, a)
    check_options(check, a)


def fake_selection(a: Call) -> tuple[Tensor, Tensor]:
    """(B, L or capacity) int64 and (B) int32."""
    batch, length = a.token_types.shape
    keep = a.token_types.new_empty(batch, length if a.capacity is None else a.capacity, dtype=torch.int64)
    return keep, a.token_types.new_empty(batch, dtype=torch.int32)


define(select_dual, _check_dual, fake_selection, float_results=False)
define(select_topk, _check_topk, fake_selection, float_results=False)
