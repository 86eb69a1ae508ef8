# SPDX-License-Identifier: Apache-2.0
"""The operators in Triton, for NVIDIA and AMD GPUs.

Files are named after the operator families of ``mustdrop_kernels.ops`` and imported on the first call. Importing this
package does not import Triton and touches no device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from ...ops.contract import CONTRACTS
from ..lazy import when_called

OLDEST = (3, 4)


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter on the CPU. Triton reads the variable once, at kernel definition."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@lru_cache(None)
def version() -> tuple[int, int] | None:
    """Version of Triton, read without importing it; None if it is not installed."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^__version__\s*=\s*['\"](\d+)\.(\d+)", Path(spec.origin).read_text(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


@lru_cache(None)
def defined(op: str) -> bool:
    """True if this backend implements an operator, determined without importing Triton."""
    file = Path(__file__).with_name(f"{CONTRACTS[op].family}.py")
    return file.is_file() and f"\ndef {op}(" in file.read_text()


def why_not(op: str, device_type: str) -> str | None:
    """The reason that Triton does not serve an operator on a device, or None. Touches no device."""
    if device_type == "cpu" and not interpreted():
        return "it serves CUDA tensors (and CPU tensors where TRITON_INTERPRET=1 is set)"
    if device_type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is built without CUDA and without ROCm"
        if interpreted():
            return "TRITON_INTERPRET=1 is set: it serves CPU tensors"
    if device_type not in ("cpu", "cuda"):
        return "it serves CUDA tensors"
    found = version()
    if found is None:
        return "triton is not installed"
    if found < OLDEST:
        return f"triton {found[0]}.{found[1]} is installed: needs {OLDEST[0]}.{OLDEST[1]} or newer"
    return None if defined(op) else "there is no Triton kernel for it"


def implementation(op: str) -> Callable[..., object]:
    """The operator as a function that imports Triton and the operator's file on its first call."""

    def kernel() -> Callable[..., object]:
        found: Callable[..., object] = getattr(import_module(f"{__name__}.{CONTRACTS[op].family}"), op)
        if os.environ.get("MUSTDROP_AUTOTUNE") == "1" and not CONTRACTS[op].writes and not interpreted():
            found = import_module(f"{__name__}.autotune").tuned(found)
        return found

    return when_called(kernel)
