# SPDX-License-Identifier: Apache-2.0
"""Attention of the CLS token on each key."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import softmax


def cls_attention(
    q: Tensor,  # [B, H, D]
    k: Tensor,  # [B, H, S, D]
    scale: float,
    *,
    counts: Tensor | None = None,  # [B]
    num_prefix_tokens: int = 1,
) -> Tensor:  # [B, S]
    """See ``mustdrop_kernels.cls_attention``."""
    column = torch.arange(k.shape[2], device=k.device)
    real = column < (counts[:, None] if counts is not None else k.shape[2])  # [B, S] or [S]
    real = real.expand(k.shape[0], -1)
    scores = scale * torch.einsum("bhd,bhsd->bhs", q.double(), k.double())  # float64: as in ``scores``
    probability = softmax(scores, real[:, None], None).sum(1) / max(q.shape[1], 1)
    return probability.masked_fill(~real | (column < num_prefix_tokens), 0.0).float()
