# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a CUDA toolkit: CuPy compiles them with NVRTC on first use.

The launchers are those of the CUDA library, compiled without CUDA (``libmustdrop_nvrtc``); the kernel sources ship in
``lib/kernels``. Compiled kernels are kept in CuPy's cache folder. Importing this package does not import CuPy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from ... import _load
from ..lazy import when_called


def why_not(op: str, device_type: str) -> str | None:
    """The reason that CuPy does not serve an operator on a device, or None. Touches no device."""
    if device_type != "cuda":
        return "it serves CUDA tensors"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not _load.nvrtc.path.is_file():
        return f"{_load.nvrtc.path.name} was not built (not found in {_load.nvrtc.path.parent})"
    if find_spec("cupy") is None:
        major = torch.version.cuda.split(".")[0]
        return f"cupy is not installed (for the CUDA of this torch: pip install cupy-cuda{major}x)"
    return _why_no_launcher(op)


def _why_no_launcher(op: str) -> str | None:
    """The reason that there is no launcher for an operator, or None. Loads the launcher library."""
    if not _load.nvrtc.loaded:
        _load.nvrtc.load()
    if _load.nvrtc.problem is not None:
        return _load.nvrtc.problem
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"mustdrop_nvrtc::{op}", "CUDA")
    return None if has else "there is no CUDA launcher for it"


def implementation(op: str) -> Callable[..., object]:
    """The operator as a function that imports CuPy and loads the launchers on its first call."""

    def kernel() -> Callable[..., object]:
        from . import gpu, launchers

        launchers.connect_once(gpu.Gpu)
        return getattr(torch.ops.mustdrop_nvrtc, op).default

    return when_called(kernel)
