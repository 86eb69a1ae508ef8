# SPDX-License-Identifier: Apache-2.0
"""Contracts: the argument checks, result shapes and gradient of each operator.

A family file (``merge.py``, ``scores.py``, ...) passes an operator's documented function to ``define`` together with
its check and its fake. Both take a bound call, one object with the arguments by their schema names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._namespace import NAMESPACE

Implementation = Callable[..., Any]


class Call:
    """The arguments of one call by name, defaults included; ``op`` is the operator's name."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, op: str, arguments: Mapping[str, Any]) -> None:
        self.__dict__.update(arguments)
        self.op = op


class Gradient(NamedTuple):
    """The gradient of an operator with respect to its first argument."""

    saved: Callable[[Call, tuple[Tensor, ...]], tuple[Tensor | None, ...]]
    """(call, results) -> the tensors to save for ``backward``."""
    backward: Callable[[Call, torch.Size, Tensor, tuple[Tensor | None, ...]], Tensor]
    """(call without its tensors, the argument's shape, gradient of the first result, saved tensors) -> gradient."""
    forward: Callable[[Call, Tensor, tuple[Tensor | None, ...]], Tensor]
    """(call without its tensors, tangent of the argument, saved tensors) -> tangent of the first result."""


@dataclass(frozen=True)
class Contract:
    """One operator.

    Args:
        name: ``torch.ops.mustdrop.<name>``.
        family: the module of ``mustdrop_kernels.ops`` that defines it; backends name their files after it.
        defaults: its arguments in the schema's order, ``inspect.Parameter.empty`` where they are required.
        check: raises a RuntimeError that names the operator, the argument, its requirement and its value.
        fake: empty results of the right shapes, dtypes and device.
        writes: the arguments (lists of tensors) that are modified in place.
        float_results: whether a result is floating-point, so that it could require a gradient.
        gradient: None if the operator has none.
        folds: whether the sequences along dimension 0 of all tensors are independent, so that ``vmap`` extends it.
        composite: composes it of other operators of the same backend, for backends without a kernel of their own:
            (from an operator's name to its implementation, the call) -> results.
        parts: the operators that ``composite`` calls.
    """

    name: str
    family: str
    defaults: Mapping[str, Any]
    check: Callable[[Call], None]
    fake: Callable[[Call], Any]
    writes: tuple[str, ...] = ()
    float_results: bool = True
    gradient: Gradient | None = None
    folds: Callable[[Call], bool] = lambda call: True
    composite: Callable[[Callable[[str], Implementation], Call], Any] | None = None
    parts: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call with these positional and keyword arguments."""
        return Call(self.name, {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs})


CONTRACTS: dict[str, Contract] = {}
_libraries: list[torch.library.Library] = []  # kept alive: a registration lives as long as its Library


def define(
    function: Callable[..., Any], check: Callable[[Call], None], fake: Callable[[Call], Any], **more: Any
) -> None:
    """Register the contract of a documented function; ``more``: further fields of ``Contract``."""
    parameters = inspect.signature(function).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "backend"}
    name, family = function.__name__, function.__module__.rpartition(".")[2]
    CONTRACTS[name] = Contract(name, family, defaults, check, fake, **more)


def check(op: str, *args: Any, **kwargs: Any) -> None:
    """Check the arguments of a call.

    Raises:
        RuntimeError: an argument is invalid; the message names it.
    """
    contract = CONTRACTS[op]
    contract.check(contract.bind(args, kwargs))


def checked(op: str, implementation: Implementation) -> Implementation:
    """Wrap an implementation with the argument checks."""

    def call(*args: Any, **kwargs: Any) -> Any:
        check(op, *args, **kwargs)
        return implementation(*args, **kwargs)

    return call


def fake(op: str) -> Implementation:
    """The operator on fake tensors: argument checks, and results without contents."""
    contract = CONTRACTS[op]

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = contract.bind(args, kwargs)
        contract.check(bound)
        return contract.fake(bound)

    return call


def device_type(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Device type of the first tensor among a call's arguments and their lists; None without tensors."""
    for value in (*args, *kwargs.values()):
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor):
                return t.device.type
    return None


def register_fakes() -> None:
    """Register the fakes with torch, for torch.compile and export. Called once, at import."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for op, contract in CONTRACTS.items():
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake(op))
        if contract.writes:
            library.impl(op, _empty_call(op), "CompositeExplicitAutograd")


def _empty_call(op: str) -> Implementation:
    """The operator where no device decides: a call whose lists are all empty, which has no effect."""

    def call(*args: Any, **kwargs: Any) -> None:
        on = device_type(args, kwargs)
        if on is not None:
            raise NotImplementedError(f"mustdrop::{op}: no backend serves {on} tensors")
        check(op, *args, **kwargs)

    return call


def composed(op: str, implementation: Callable[[str], Implementation]) -> Implementation:
    """The composite of an operator over a backend's implementations of its parts.

    The parts check their arguments; their errors are raised under the composite's name.
    """
    contract = CONTRACTS[op]
    composite = contract.composite
    assert composite is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = contract.bind(args, kwargs)
        try:
            return composite(implementation, bound)
        except RuntimeError:
            contract.check(bound)
            raise

    return call
