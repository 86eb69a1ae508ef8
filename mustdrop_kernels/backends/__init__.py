# SPDX-License-Identifier: Apache-2.0
"""The built-in backends. Third-party backends are registered through ``mustdrop_kernels.ops.registry``."""

from __future__ import annotations

import torch

from .. import _load
from .._namespace import NAMESPACE
from ..ops import OPS
from ..ops.contract import Implementation
from ..ops.registry import (
    ORDER,
    Backend,
    BackendError,
    explicit,
    get,
    register_backend,
    registered,
    serve_dispatcher,
    serving,
    use_backend,
)

__all__ = [
    "OPS",
    "ORDER",
    "Backend",
    "BackendError",
    "Implementation",
    "explicit",
    "get",
    "register_backend",
    "registered",
    "serve_dispatcher",
    "serving",
    "use_backend",
]


def _has_kernel(op: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", dispatch_key)


def _library_kernels(dispatch_key: str) -> dict[str, Implementation]:
    """Kernels of the C++ libraries, looked up at import: another backend may be registered on this key later."""
    ops = filter(lambda op: _has_kernel(op, dispatch_key), OPS if _load.core.loaded else ())
    return {op: _boxed(torch.library.get_kernel(f"{NAMESPACE}::{op}", dispatch_key), dispatch_key) for op in ops}


def _boxed(kernel: object, dispatch_key: str) -> Implementation:
    """Wrap a dispatcher kernel as a function of the schema's arguments."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def call(*args: object, **kwargs: object) -> object:
        return kernel.call_boxed(keys, *args, **kwargs)  # type: ignore[attr-defined]

    return call


def _builtin(device_type: str, library: _load.Library, description: str) -> Backend:
    """Backend of a C++ library's kernels for a device, named after the device."""
    kernels = _library_kernels(device_type.upper())

    def why_not(op: str, on: str) -> str | None:
        if on != device_type:
            return f"it serves {device_type.upper()} tensors"
        if library.problem is not None:
            return library.problem
        return None if op in kernels else f"{library.path.stem} was built without a kernel for it"

    return Backend(device_type, kernels.__getitem__, why_not, description, in_dispatcher=True)


def _builtin_reference() -> Backend:
    from . import reference

    return Backend("reference", reference.implementation, reference.why_not, "plain PyTorch, reads like the formulas")


def _builtin_triton() -> Backend:
    from . import triton

    return Backend("triton", triton.implementation, triton.why_not, "Triton kernels, compiled on first use")


def _builtin_cupy() -> Backend:
    from . import cupy

    return Backend("cupy", cupy.implementation, cupy.why_not, "the CUDA kernels, compiled by NVRTC on first use")


register_backend(_builtin("cpu", _load.core, "C++ kernels, torch's thread pool"))
register_backend(_builtin("cuda", _load.cuda, "CUDA C++ kernels"))
register_backend(_builtin_triton())
register_backend(_builtin_cupy())
register_backend(_builtin_reference())
