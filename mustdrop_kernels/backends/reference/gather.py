# SPDX-License-Identifier: Apache-2.0
"""Taking the kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks


def gather_tokens(
    x: Tensor,  # [B, L, ...]
    keep: Tensor,  # [B, K]
    counts: Tensor,  # [B]
    *,
    align_end: bool = False,
) -> Tensor:  # [B, K, ...]
    """See ``mustdrop_kernels.gather_tokens``."""
    checks.gather_tokens(x, keep, counts, align_end=align_end)
    batch, capacity = keep.shape
    kept = counts.long().clamp(0, capacity)[:, None]
    entry = torch.arange(capacity, device=x.device).expand(batch, -1)
    if align_end:
        entry = entry - (capacity - kept)
    index = keep.gather(1, entry.clamp(min=0)) if capacity else keep
    valid = (entry >= 0) & (entry < kept) & (index >= 0) & (index < x.shape[1])
    out = x.new_zeros(batch, capacity, *x.shape[2:])
    out[valid] = x[torch.arange(batch, device=x.device)[:, None].expand_as(index)[valid], index[valid]]
    return out
