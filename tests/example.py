# SPDX-License-Identifier: Apache-2.0
"""Operators for tests that need some operator and no particular one: quick to run, each with a benchmark case."""

from __future__ import annotations

import torch
from torch import Tensor

QUICK = ("gather_tokens", "select_topk", "select_dual")
SIMPLE, OTHER = QUICK[:2]


def simple_arguments(x: Tensor, *indices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a call of SIMPLE on ``x`` (1, length, ...) whose result is ``x[:, indices]``."""
    return x, torch.tensor([indices]), torch.tensor([len(indices)], dtype=torch.int32)
