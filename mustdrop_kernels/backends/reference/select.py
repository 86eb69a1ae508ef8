# SPDX-License-Identifier: Apache-2.0
"""Selection of vision tokens by two thresholds or by a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.token_types import TokenType
from .order import indices_of, rank_descending


def _keep(
    dropped: Tensor,  # [B, L] bool: vision tokens to drop
    score: Tensor,  # [B, L]: their ranking
    token_types: Tensor,  # [B, L]
    capacity: int | None,
    drop_multiple: int,
) -> tuple[Tensor, Tensor]:
    """Kept positions after the number of dropped tokens is rounded down to a multiple."""
    spared = dropped.sum(-1, keepdim=True) % drop_multiple
    dropped = dropped & (rank_descending(score, dropped) >= spared)
    return indices_of(
        (token_types != TokenType.PADDING) & ~dropped, token_types.shape[1] if capacity is None else capacity
    )


def select_dual(
    total: Tensor,  # [B, L]
    peak: Tensor,  # [B, L]
    token_types: Tensor,  # [B, L]
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,  # [B, L]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.select_dual``."""
    total, peak = total.float(), peak.float()
    limit = torch.tensor(global_threshold, dtype=torch.float32, device="cpu").item() * total.sum(-1, keepdim=True)
    dropped = (total < limit) & (peak < torch.tensor(individual_threshold, dtype=torch.float32, device="cpu").item())
    dropped &= token_types == TokenType.VISION
    if protected is not None:
        dropped &= ~protected
    return _keep(dropped, total, token_types, capacity, drop_multiple)


def select_topk(
    scores: Tensor,  # [B, L]
    token_types: Tensor,  # [B, L]
    k: int,
    *,
    budgets: Tensor | None = None,  # [B]
    protected: Tensor | None = None,  # [B, L]
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.select_topk``."""
    scores = scores.float()
    vision = token_types == TokenType.VISION
    safe = vision & protected if protected is not None else torch.zeros_like(vision)
    budget = k if budgets is None else budgets[:, None].long().clamp(min=0)
    open_places = budget - safe.sum(-1, keepdim=True)
    candidate = vision & ~safe
    dropped = candidate & (rank_descending(scores, candidate) >= open_places)
    return _keep(dropped, scores, token_types, capacity, drop_multiple)
