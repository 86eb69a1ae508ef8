# SPDX-License-Identifier: Apache-2.0
"""Order of all selections: higher first, ties to the lower index, NaN last."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_descending(
    score: Tensor,  # [B, L]
    candidate: Tensor,  # [B, L] bool
) -> Tensor:  # [B, L] int64
    """Rank of each candidate; tokens that are no candidates rank after all of them."""
    nan = score.isnan()
    by_score = score.masked_fill(nan, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    group = torch.where(candidate, nan.long(), 2)  # numbers, then NaN, then non-candidates
    order = by_score.gather(-1, group.gather(-1, by_score).argsort(dim=-1, stable=True))
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


def indices_of(
    mask: Tensor,  # [B, L] bool
    capacity: int,
) -> tuple[Tensor, Tensor]:  # [B, capacity] int64, [B] int32
    """Ascending positions of the true entries, padded with -1; and their number."""
    counts = mask.sum(-1)
    order = (~mask).long().argsort(dim=-1, stable=True)[:, :capacity]
    keep = torch.full((mask.shape[0], capacity), -1, dtype=torch.int64, device=mask.device)
    keep[:, : order.shape[1]] = order
    beyond = torch.arange(capacity, device=mask.device) >= counts[:, None]
    return keep.masked_fill(beyond, -1), counts.int()
