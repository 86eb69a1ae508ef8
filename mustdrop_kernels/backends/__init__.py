# SPDX-License-Identifier: Apache-2.0
"""Who serves which operator on which device, and why not.

A backend implements operators with the schema's arguments. On each device one backend serves ``torch.ops.mustdrop.*``:
the one that the environment variable ``MUSTDROP_BACKEND`` names (read once, when the package is imported), else the
first of the device's order below that can. An explicit choice never falls back: what it cannot serve raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from .. import _load
from .._namespace import NAMESPACE, operator

OPS = (
    "spatial_merge",
    "cls_attention",
    "text_vision_scores",
    "text_vision_scores_varlen",
    "text_vision_scores_paged",
    "text_vision_attention",
    "select_dual",
    "select_topk",
    "dual_attention_select",
    "topk_attention_select",
    "gather_tokens",
    "compact_kv_",
    "compact_paged_kv_",
)

# Backends that serve torch.ops.mustdrop.* by default, best first.
ORDER: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("cpu",), "cuda": ("cuda", "triton", "cupy")})

Implementation = Callable[..., object]


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot serve; the message says why."""


@dataclass(frozen=True)
class Backend:
    """A set of implementations of the operators.

    Args:
        name: what ``backend=``, ``use_backend`` and ``MUSTDROP_BACKEND`` call it.
        implementation: from an operator's name (one of ``OPS``) to a callable with the schema's arguments.
        why_not: from an operator's name and a device type ("cpu", "cuda") to the reason why this backend does not serve
            it there, None where it does. Cheap; touches no device.
        in_dispatcher: the C++ library has registered it with torch's dispatcher already.
        description: one line for ``mustdrop doctor``.
    """

    name: str
    implementation: Callable[[str], Implementation]
    why_not: Callable[[str, str], str | None]
    description: str = ""
    in_dispatcher: bool = field(default=False, compare=False)


_registered: dict[str, Backend] = {}
_serving: dict[str, str] = {}  # device type -> backend behind torch.ops.mustdrop.*
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("mustdrop_backend", default=None)
# The same for torch.compile, which cannot trace a ContextVar but compiles again when a global has changed.
_traced_choice: str | None = None
_libraries: list[torch.library.Library] = []  # kept alive: a registration lives as long as its Library


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make a backend available by name.

    Raises:
        ValueError: the name is taken and ``replace`` is not set.
    """
    if backend.name in _registered and not replace:
        raise ValueError(f"a backend named {backend.name!r} is registered already; pass replace=True to replace it")
    _registered[backend.name] = backend


def registered() -> Mapping[str, Backend]:
    """All backends by name."""
    return MappingProxyType(_registered)


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BackendError: there is none.
    """
    if name not in _registered:
        raise BackendError(f"no backend named {name!r}; there are {', '.join(sorted(_registered))}")
    return _registered[name]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Within the context the functions of ``mustdrop_kernels`` use this backend (``torch.ops.mustdrop.*`` do not).

    Raises:
        BackendError: there is no backend of this name.
    """
    global _traced_choice
    backend = get(name)
    token, before = _chosen.set(name), _traced_choice
    _traced_choice = name
    try:
        yield backend
    finally:
        _chosen.reset(token)
        _traced_choice = before


def serving(device_type: str) -> str | None:
    """The name of the backend behind ``torch.ops.mustdrop.*`` on a device, None where nobody serves."""
    return _serving.get(device_type)


def _chosen_now() -> str | None:
    return _traced_choice if torch.compiler.is_compiling() else _chosen.get()


def explicit(op: str, device_type: str, name: str | None) -> Implementation | None:
    """The implementation that ``backend=`` or ``use_backend`` asks for, None where torch.ops is what is asked for.

    Raises:
        BackendError: the choice does not exist or does not serve this operator on this device.
    """
    name = name or _chosen_now()
    if name is None or name == _serving.get(device_type):
        return None
    backend = get(name)
    reason = backend.why_not(op, device_type)
    if reason is not None:
        raise BackendError(f"backend {name!r} does not serve {op} on {device_type}: {reason}")
    return backend.implementation(op)


def serve_dispatcher() -> None:
    """Decide who is behind ``torch.ops.mustdrop.*`` on each device and register it there. Called once, at import."""
    asked = os.environ.get("MUSTDROP_BACKEND") or None
    if asked is not None and asked not in _registered:
        # Every operator refuses rather than the import, so that `mustdrop doctor` can say what is wrong.
        for device_type in ORDER:
            _refuse_in_dispatcher(_unknown(asked), device_type)
        return
    for device_type, order in ORDER.items():
        candidates = (asked,) if asked is not None else order
        for name in candidates:
            backend = _registered.get(name)
            if backend is not None and all(backend.why_not(op, device_type) is None for op in OPS):
                _serving[device_type] = name
                _register_with_dispatcher(backend, device_type)
                break
        else:
            if asked is not None:
                _refuse_in_dispatcher(get(asked), device_type)


def _unknown(name: str) -> Backend:
    """Stands for a name that nobody registered: serves nothing, and says so."""
    reason = f"no backend named {name!r}; there are {', '.join(sorted(_registered))}"
    return Backend(name, operator, lambda op, device_type: reason)


def _register_with_dispatcher(backend: Backend, device_type: str) -> None:
    if backend.in_dispatcher:
        return
    library = torch.library.Library(NAMESPACE, "IMPL", device_type.upper())
    _libraries.append(library)
    for op in OPS:
        _override(library, op, backend.implementation(op))


def _refuse_in_dispatcher(backend: Backend, device_type: str) -> None:
    """An explicit MUSTDROP_BACKEND that does not serve a device: its operators raise there, nobody else steps in."""

    def refusing(op: str) -> Implementation:
        def refuse(*args: object, **kwargs: object) -> object:
            reason = backend.why_not(op, device_type)
            raise BackendError(f"MUSTDROP_BACKEND={backend.name} does not serve {op} on {device_type}: {reason}")

        return refuse

    library = torch.library.Library(NAMESPACE, "IMPL", device_type.upper())
    _libraries.append(library)
    for op in OPS:
        _override(library, op, refusing(op))


def _override(library: torch.library.Library, op: str, implementation: Implementation) -> None:
    with warnings.catch_warnings():  # replacing the C++ kernel is what was asked for
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*")
        library.impl(op, implementation)


def _has_kernel(op: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", dispatch_key)


def _library_kernels(dispatch_key: str) -> dict[str, Implementation]:
    """The C++ libraries' kernels. Taken at import: another backend may be put on this dispatch key later."""
    ops = filter(lambda op: _has_kernel(op, dispatch_key), OPS if _load.core.loaded else ())
    return {op: _boxed(torch.library.get_kernel(f"{NAMESPACE}::{op}", dispatch_key), dispatch_key) for op in ops}


def _boxed(kernel: object, dispatch_key: str) -> Implementation:
    """A dispatcher kernel as a function of the schema's arguments."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def call(*args: object, **kwargs: object) -> object:
        return kernel.call_boxed(keys, *args, **kwargs)  # type: ignore[attr-defined]

    return call


def _builtin(device_type: str, library: _load.Library, description: str) -> Backend:
    """What a C++ library has registered for a device, under the device's name."""
    kernels = _library_kernels(device_type.upper())

    def why_not(op: str, on: str) -> str | None:
        if on != device_type:
            return f"it serves {device_type.upper()} tensors"
        if library.problem is not None:
            return library.problem
        return None if op in kernels else f"{library.path.stem} was built without a kernel for it"

    return Backend(device_type, kernels.__getitem__, why_not, description, in_dispatcher=True)


def _builtin_reference() -> Backend:
    def implementation(op: str) -> Implementation:
        from . import reference

        return getattr(reference, op)

    return Backend("reference", implementation, lambda op, device_type: None, "plain PyTorch, reads like the formulas")


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
