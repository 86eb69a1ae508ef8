# SPDX-License-Identifier: Apache-2.0
"""Reference implementations in plain PyTorch: slow, written to be read beside the formulas of the documentation.

Files are named after the operator families of ``mustdrop_kernels.ops``, which check the arguments.
"""

from __future__ import annotations

from importlib import import_module

from ...ops.contract import CONTRACTS, Implementation, checked


def why_not(op: str, device_type: str) -> str | None:
    """None for every operator on every device; composites are composed of their parts."""
    return "it is composed of its parts" if CONTRACTS[op].composite else None


def implementation(op: str) -> Implementation:
    """The operator as a function that checks its arguments first."""
    family = import_module(f"{__name__}.{CONTRACTS[op].family}")
    return checked(op, getattr(family, op))
