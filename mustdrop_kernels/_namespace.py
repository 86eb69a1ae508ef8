# SPDX-License-Identifier: Apache-2.0
"""Where the operators are: ``torch.ops.mustdrop``, unless this is a copy that was laid out for the hub.

``hub/hf_kernel.py`` writes another name into a copy, so that copies of several versions live in one process.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "mustdrop"


def operator(op: str) -> Any:
    """``torch.ops.mustdrop.<op>``."""
    return getattr(getattr(torch.ops, NAMESPACE), op)
