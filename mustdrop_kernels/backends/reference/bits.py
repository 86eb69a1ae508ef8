# SPDX-License-Identifier: Apache-2.0
"""Integer views for moving tokens: no bit of a float8 or of a signaling NaN changes."""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: Tensor) -> Tensor:
    """View of the same memory as integers of the same size."""
    same_size = _SAME_SIZE.get(x.element_size())
    return x if same_size is None else x.view(same_size)
