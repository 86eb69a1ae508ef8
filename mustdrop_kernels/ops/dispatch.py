# SPDX-License-Identifier: Apache-2.0
"""The call behind every documented function: an explicit backend, or ``torch.ops.mustdrop``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _load
from .._namespace import operator
from . import registry
from .contract import CONTRACTS
from .explicit import explicit_operator


def call(op: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Call an operator.

    Args:
        op: name of the operator.
        backend: name of an explicit backend; None: that of ``use_backend``, else ``torch.ops.mustdrop``.
        args: positional arguments in the schema's order, tensors and lists of tensors first.
        kwargs: keyword arguments.

    Raises:
        TypeError: the first argument is not a tensor.
        BackendError: the explicit backend does not exist or does not serve the operator on this device.
        RuntimeError: an argument is invalid, or the operator library is not loaded.
    """
    device_type = _device_type(op, args)
    name = registry.chosen(op, device_type, backend)
    if _load.core.loaded:
        return operator(op)(*args, **kwargs) if name is None else explicit_operator(op)(name, *args, **kwargs)
    if name is None:
        raise RuntimeError(f"mustdrop_kernels has no operators here: {_load.core.problem}")
    return registry.implementation(op, device_type, name)(*args, **kwargs)


def _device_type(op: str, args: tuple[Any, ...]) -> str | None:
    """Device type of the first tensor; None if there are only empty lists."""
    if isinstance(args[0], Tensor):
        return args[0].device.type
    for index, arg in enumerate(args):
        is_list = isinstance(arg, list)
        if is_list and not arg:
            continue
        first = arg[0] if is_list else arg
        if isinstance(first, Tensor):
            return first.device.type
        name = list(CONTRACTS[op].defaults)[index] + "[0]" * is_list
        raise TypeError(f"mustdrop::{op}: {name} must be a Tensor, got {type(first).__name__}")
    return None
