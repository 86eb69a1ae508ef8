# SPDX-License-Identifier: Apache-2.0
"""Namespace of the operators: ``torch.ops.mustdrop``, except in a copy for the Hugging Face hub.

``hub/hf_kernel.py`` writes another name into a copy, so that several versions can be loaded in one process.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "mustdrop"


def operator(op: str) -> Any:
    """``torch.ops.mustdrop.<op>``."""
    return getattr(getattr(torch.ops, NAMESPACE), op)
