# SPDX-License-Identifier: Apache-2.0
"""Tokens that only move are moved as integers: no bit of a float8 or of a signalling NaN changes."""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: Tensor) -> Tensor:
    """The same memory as integers, whatever it means."""
    same_size = _SAME_SIZE.get(x.element_size())
    return x if same_size is None else x.view(same_size)
