# SPDX-License-Identifier: Apache-2.0
"""Gathering of the kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import as_integers


def gather_tokens(
    x: Tensor,  # [B, L, ...]
    keep: Tensor,  # [B, K]
    counts: Tensor,  # [B]
    *,
    align_end: bool = False,
) -> Tensor:  # [B, K, ...]
    """See ``mustdrop_kernels.gather_tokens``."""
    batch, capacity = keep.shape
    length = x.shape[1]
    if length == 0 or batch == 0:
        return x.new_zeros(batch, capacity, *x.shape[2:])
    kept = counts.long().clamp(0, capacity)[:, None]
    entry = torch.arange(capacity, device=x.device).expand(batch, -1)
    if align_end:
        entry = entry - (capacity - kept)
    index = keep.gather(1, entry.clamp(min=0))
    valid = (entry >= 0) & (entry < kept) & (index >= 0) & (index < length)
    row = torch.arange(batch, device=x.device)[:, None]
    taken = as_integers(x)[row, index.clamp(0, length - 1)]
    return taken.masked_fill(~valid.view(batch, capacity, *[1] * (x.dim() - 2)), 0).view(x.dtype)
