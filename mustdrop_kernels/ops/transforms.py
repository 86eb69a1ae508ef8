# SPDX-License-Identifier: Apache-2.0
"""The operators under the transforms of ``torch.func``: differentiation (``autograd.py``), batching by ``vmap``, and
errors for in-place operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import _pytree as pytree

from .._namespace import NAMESPACE, operator
from . import autograd
from .contract import CONTRACTS, Call, Contract

_libraries: list[torch.library.Library] = []


def _folded(call: Callable[..., Any], size: int, dims: Sequence[Any], values: Sequence[Any]) -> Any:
    """One call in which dimension 0 of each tensor runs over the mapped dimension and the batch."""

    def fold(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        mapped = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return mapped.contiguous().flatten(0, 1)

    result = call(*map(fold, values, dims))
    return pytree.tree_map(lambda t: t.unflatten(0, (size, t.shape[0] // size)), result)


def _looped(call: Callable[..., Any], size: int, dims: Sequence[Any], values: Sequence[Any]) -> Any:
    """One call for each index of the mapped dimension."""

    def nth(i: int) -> Iterator[Any]:
        for value, dim in zip(values, dims, strict=True):
            mapped = isinstance(value, Tensor) and dim is not None
            yield value.select(dim, i).contiguous() if mapped else value

    results = [call(*nth(i)) for i in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(map(torch.stack, zip(*results, strict=True)))


def _register_batching(library: torch.library.Library, contract: Contract, overload: Any, leading: int) -> None:
    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        given = vars(contract.bind(args[leading:], kwargs))
        names = list(contract.defaults)

        def call(*values: Any) -> Any:
            return overload(*args[:leading], **dict(zip(names, values, strict=True)))

        def rule(info: Any, dims: Sequence[Any], *values: Any) -> Any:
            bound = Call(contract.name, dict(zip(names, values, strict=True)))
            way = _folded if contract.folds(bound) else _looped
            result = way(call, info.batch_size, dims, values)
            return result, pytree.tree_map(lambda _: 0, result)

        interpreter = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, rule, call, *(given[name] for name in names))  # type: ignore[arg-type]

    library.impl(contract.name, kernel, "FuncTorchBatched", with_keyset=True)


def register(library: torch.library.Library, op: str, overload: Any, leading: int = 0) -> None:
    """Register an operator's gradient and batching, or the refusals of an in-place operator, with torch's dispatcher.

    ``overload``: the operator, with ``leading`` arguments in front of those of its contract.
    """
    contract = CONTRACTS[op]
    if contract.float_results:
        autograd.register(library, contract, overload, leading)
    if not contract.writes:
        _register_batching(library, contract, overload, leading)
        return

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"mustdrop::{op}: keys and values must not be written inside a transform of torch.func (grad, vmap, ...),"
            " which tracks no changes in place by operators; call it outside"
        )

    library.impl(op, refuse, "FuncTorchDynamicLayerFrontMode")


def register_all() -> None:
    """Do so for ``torch.ops.mustdrop``. Called once, at import."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for op in CONTRACTS:
        register(library, op, operator(op).default)
