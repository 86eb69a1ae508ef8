# SPDX-License-Identifier: Apache-2.0
"""The call behind every documented function: an explicit backend, or ``torch.ops.mustdrop``."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from .. import _load
from .._namespace import operator
from . import autograd, registry
from .contract import CONTRACTS


def call(op: str, backend: str | None, on: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call an operator.

    Args:
        op: name of the operator.
        backend: name of an explicit backend; None: that of ``use_backend``, else ``torch.ops.mustdrop``.
        on: the tensor whose device the operator runs on, one of ``args`` or the first of a list there.
        args: positional arguments in the schema's order.
        kwargs: keyword arguments.

    Raises:
        TypeError: ``on`` is not a tensor.
        BackendError: the explicit backend does not exist or does not serve the operator on this device.
        RuntimeError: an argument is invalid, or the operator library is not loaded.
    """
    if not isinstance(on, Tensor):
        _refuse_type(op, on, args)
    implementation = registry.explicit(op, on.device.type, backend)
    if implementation is None:
        if not _load.core.loaded:
            raise RuntimeError(f"mustdrop_kernels has no operators here: {_load.core.problem}")
        return operator(op)(*args, **kwargs)
    if autograd.needs_gradient(args, kwargs):
        return autograd.apply(op, implementation, args, kwargs)
    return implementation(*args, **kwargs)


def _refuse_type(op: str, given: object, args: tuple[Any, ...]) -> NoReturn:
    name = next(
        f"{name}[0]" if isinstance(arg, list) else name
        for name, arg in zip(CONTRACTS[op].defaults, args, strict=False)
        if arg is given or (isinstance(arg, list) and arg and arg[0] is given)
    )
    raise TypeError(f"mustdrop::{op}: {name} must be a Tensor, got {type(given).__name__}")
