# SPDX-License-Identifier: Apache-2.0
"""Registry of backends, and the choice of the one that serves an operator on a device.

For each operator and device one backend serves ``torch.ops.mustdrop.*``: the one that the environment variable
``MUSTDROP_BACKEND`` names (read once, when the package is imported), else the first of the device's order below that
has the operator. An explicit choice never falls back: a call of an operator that it does not serve raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from .._namespace import NAMESPACE
from . import contract
from .contract import CONTRACTS, Implementation, composed

# Backends that serve torch.ops.mustdrop.* by default, best first.
ORDER: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("cpu",), "cuda": ("cuda", "triton", "cupy")})


class BackendError(RuntimeError):
    """An explicitly chosen backend does not serve a call; the message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """A set of implementations of the operators.

    A composite operator (``dual_attention_select``, ``topk_attention_select``) requires no implementation: a backend
    that serves its parts serves it.

    Args:
        name: its name in ``backend=``, ``use_backend`` and ``MUSTDROP_BACKEND``.
        implementation: maps an operator's name (one of ``OPS``) to a callable with the schema's arguments.
        why_not: maps an operator's name and a device type ("cpu", "cuda") to the reason that this backend does not
            serve it there, or None. Must be cheap and touch no device.
        description: one line for ``mustdrop doctor``.
        in_dispatcher: the C++ library has already registered it with torch's dispatcher.
    """

    name: str
    implementation: Callable[[str], Implementation]
    why_not: Callable[[str, str], str | None]
    description: str = ""
    in_dispatcher: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_own", (self.implementation, self.why_not))
        object.__setattr__(self, "implementation", self._implementation)
        object.__setattr__(self, "why_not", self._why_not)

    def composes(self, op: str) -> bool:
        """True if it composes an operator of its parts, without an implementation of its own."""
        contract = CONTRACTS.get(op)
        if contract is None or contract.composite is None:
            return False
        _, own_reason = self._own  # type: ignore[attr-defined]
        return all(own_reason(op, device_type) is not None for device_type in ORDER)

    def _implementation(self, op: str) -> Implementation:
        own, _ = self._own  # type: ignore[attr-defined]
        return composed(op, own) if self.composes(op) else own(op)

    def _why_not(self, op: str, device_type: str) -> str | None:
        _, own_reason = self._own  # type: ignore[attr-defined]
        needed = CONTRACTS[op].parts if self.composes(op) else (op,)
        reasons = (own_reason(each, device_type) for each in needed)
        return next((reason for reason in reasons if reason is not None), None)


_registered: dict[str, Backend] = {}
_serving: dict[tuple[str, str], str] = {}  # (operator, device type) -> backend behind torch.ops.mustdrop.*
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("mustdrop_backend", default=None)
# The same for torch.compile, which cannot trace a ContextVar but recompiles when a global has changed.
_traced_choice: str | None = None
_libraries: list[torch.library.Library] = []  # kept alive: a registration lives as long as its Library


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make a backend available by name.

    Raises:
        ValueError: the name is already registered and ``replace`` is not set.
    """
    if backend.name in _registered and not replace:
        raise ValueError(f"a backend named {backend.name!r} is registered already; pass replace=True to replace it")
    _registered[backend.name] = backend


def registered() -> Mapping[str, Backend]:
    """All backends by name."""
    return MappingProxyType(_registered)


def get(name: str) -> Backend:
    """Return the backend of this name.

    Raises:
        BackendError: there is no backend of this name.
    """
    if name not in _registered:
        raise BackendError(_unknown(name))
    return _registered[name]


def _unknown(name: str) -> str:
    return f"no backend named {name!r}; there are {', '.join(sorted(_registered))}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Context in which the functions of ``mustdrop_kernels`` use this backend (``torch.ops.mustdrop.*`` do not).

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


def serving(op: str, device_type: str) -> str | None:
    """Name of the backend behind ``torch.ops.mustdrop.<op>`` on a device; None if no backend serves it."""
    return _serving.get((op, device_type))


def _chosen_now() -> str | None:
    return _traced_choice if torch.compiler.is_compiling() else _chosen.get()


def chosen(op: str, device_type: str | None, name: str | None) -> str | None:
    """Name of the backend that ``backend=`` or ``use_backend`` chooses; None for that of ``torch.ops.mustdrop``."""
    name = name or _chosen_now()
    serves = device_type is not None and name == _serving.get((op, device_type))
    return None if serves else name


def explicit(op: str, device_type: str, name: str | None) -> Implementation | None:
    """The implementation that ``backend=`` or ``use_backend`` chooses; None for ``torch.ops.mustdrop``.

    Raises:
        BackendError: the chosen backend does not exist or does not serve this operator on this device.
    """
    name = chosen(op, device_type, name)
    return None if name is None else implementation(op, device_type, name)


def implementation(op: str, device_type: str | None, name: str) -> Implementation:
    """A backend's implementation of an operator on a device; of one without tensors, on any.

    Raises:
        BackendError: the backend does not exist or does not serve this operator on this device.
    """
    backend = get(name)
    reason = None if device_type is None else backend.why_not(op, device_type)
    if reason is not None:
        raise BackendError(f"backend {name!r} does not serve {op} on {device_type}: {reason}")
    return backend.implementation(op) if device_type is not None else contract.fake(op)


def serve_dispatcher() -> None:
    """Choose the backend behind ``torch.ops.mustdrop.*`` for each operator and device, and register it there.

    Called once, at import.
    """
    requested = os.environ.get("MUSTDROP_BACKEND") or None
    for device_type in ORDER:
        library = torch.library.Library(NAMESPACE, "IMPL", device_type.upper())
        _libraries.append(library)
        for op in CONTRACTS:
            _serve(library, op, device_type, requested)


def _serve(library: torch.library.Library, op: str, device_type: str, requested: str | None) -> None:
    for name in ORDER[device_type] if requested is None else (requested,):
        backend = _registered.get(name)
        if backend is not None and backend.why_not(op, device_type) is None:
            _serving[op, device_type] = name
            if not backend.in_dispatcher or backend.composes(op):
                _override(library, op, backend.implementation(op))
            return
    if requested is not None:
        _override(library, op, _refusing(op, device_type, requested))


def _refusing(op: str, device_type: str, name: str) -> Implementation:
    """Implementation that raises, for operators that MUSTDROP_BACKEND does not serve; the import still succeeds."""

    def refuse(*args: object, **kwargs: object) -> object:
        reason = _registered[name].why_not(op, device_type) if name in _registered else _unknown(name)
        reason = reason or "it was registered after mustdrop_kernels was imported"
        raise BackendError(f"MUSTDROP_BACKEND={name} does not serve {op} on {device_type}: {reason}")

    return refuse


def _override(library: torch.library.Library, op: str, implementation: Callable[..., Any]) -> None:
    with warnings.catch_warnings():  # replacing the C++ kernel is intended
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*")
        library.impl(op, implementation)
