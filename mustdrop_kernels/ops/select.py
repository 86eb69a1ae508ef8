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
    """Positions of the tokens that stay."""

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
    """Select the tokens that stay by two thresholds.

    MustDrop (arXiv 2411.10803), stage 2, dual-attention filtering: vision token j is dropped iff
    total[j] < global_threshold * sum(total) and peak[j] < individual_threshold and j is not protected. Text tokens
    stay, padding is dropped. A NaN in ``total`` keeps all vision tokens of its sequence.

    Args:
        total: (B, L) float32, float16 or bfloat16, as ``text_vision_scores`` returns it.
        peak: (B, L) of total's dtype.
        token_types: (B, L) uint8, values of ``TokenType``.
        global_threshold: share of the attention on all vision tokens; rounded to float32.
        individual_threshold: attention of a single text query; rounded to float32.
        protected: (B, L) bool, vision tokens that are never dropped; default: none.
        capacity: number of columns of ``keep``; default: L. Where counts exceed it, ``keep`` is cut to it.
        drop_multiple: round the number of dropped tokens down to a multiple of this number, such as the page size of
            a cache: of the tokens to drop those with the highest ``total`` stay.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        keep (B, L or capacity) int64, ascending positions, -1 past counts; counts (B) int32.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (total, peak, token_types, global_threshold, individual_threshold)
    options = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*call("select_dual", backend, *args, **options))


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
    """Select k vision tokens: the protected ones first, then those with the highest scores.

    The alternative of a fixed budget to the thresholds of MustDrop (arXiv 2411.10803), stage 2; with
    ``cls_attention`` as the scores, stage 1: the key token set. All protected vision tokens stay, even where they
    exceed k. Text tokens stay, padding is dropped. Ties go to the lower index; NaN ranks lowest.

    Args:
        scores: (B, L) float32, float16 or bfloat16.
        token_types: (B, L) uint8, values of ``TokenType``.
        k: number of vision tokens of each sequence that stay.
        budgets: (B) int32, replaces ``k`` for each sequence, without a synchronization with the device.
        protected: (B, L) bool, vision tokens that are never dropped; default: none.
        capacity: number of columns of ``keep``; default: L. Where counts exceed it, ``keep`` is cut to it.
        drop_multiple: round the number of dropped tokens down to a multiple of this number, such as the page size of
            a cache: of the tokens to drop those with the highest ``scores`` stay.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        keep (B, L or capacity) int64, ascending positions, -1 past counts; counts (B) int32.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    options = {"budgets": budgets, "protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*call("select_topk", backend, scores, token_types, k, **options))


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
