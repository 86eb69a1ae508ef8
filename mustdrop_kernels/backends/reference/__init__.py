# SPDX-License-Identifier: Apache-2.0
"""Every operator in plain PyTorch: slow, and meant to be read beside the formulas of the documentation.

The file of an operator is that of its contract in ``mustdrop_kernels.ops``, which checks the arguments.
"""

from __future__ import annotations

from importlib import import_module

from ...ops.contract import CONTRACTS, Implementation, checked


def why_not(op: str, device_type: str) -> str | None:
    """The reference serves every operator on every device, composites by their parts."""
    return "it is composed of its parts" if CONTRACTS[op].composite else None


def implementation(op: str) -> Implementation:
    """The operator as a function that checks its arguments first."""
    family = import_module(f"{__name__}.{CONTRACTS[op].family}")
    return checked(op, getattr(family, op))
