# SPDX-License-Identifier: Apache-2.0
"""Scores and selection in one call: the kernels of both, one after the other, without a step on the host between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from .launch import Plans, signature
from .scores import text_vision_scores
from .select import select_dual, select_topk

_checked = Plans()


def dual_attention_select(
    q: Tensor,  # [B, Hq, Lq, D]
    k: Tensor,  # [B, Hk, Lk, D]
    token_types: Tensor,  # [B, Lk]
    scale: float,
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,  # [B, Lk]
    lse: Tensor | None = None,  # [B, Hq, Lq]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``mustdrop_kernels.dual_attention_select``."""
    options: dict[str, Any] = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    key = signature("dual", q, k, token_types, lse, protected, capacity, drop_multiple)
    if key not in _checked:
        checks.dual_attention_select(
            q, k, token_types, scale, global_threshold, individual_threshold, lse=lse, **options
        )
        _checked.add(key, True)
    total, peak = text_vision_scores(q, k, token_types, scale, lse=lse)
    keep, counts = select_dual(total, peak, token_types, global_threshold, individual_threshold, **options)
    return keep, counts, total, peak


def topk_attention_select(
    q: Tensor,  # [B, Hq, Lq, D]
    k: Tensor,  # [B, Hk, Lk, D]
    token_types: Tensor,  # [B, Lk]
    scale: float,
    budget: int,
    *,
    budgets: Tensor | None = None,  # [B]
    protected: Tensor | None = None,  # [B, Lk]
    lse: Tensor | None = None,  # [B, Hq, Lq]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``mustdrop_kernels.topk_attention_select``."""
    options: dict[str, Any] = {
        "budgets": budgets,
        "protected": protected,
        "capacity": capacity,
        "drop_multiple": drop_multiple,
    }
    key = signature("topk", q, k, token_types, lse, budget, budgets, protected, capacity, drop_multiple)
    if key not in _checked:
        checks.topk_attention_select(q, k, token_types, scale, budget, lse=lse, **options)
        _checked.add(key, True)
    total, peak = text_vision_scores(q, k, token_types, scale, lse=lse)
    keep, counts = select_topk(total, token_types, budget, **options)
    return keep, counts, total, peak
