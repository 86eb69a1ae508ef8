# SPDX-License-Identifier: Apache-2.0
"""Interface of an operator for the fuzzer, and the computation of a case by a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from ops.cases import Watch
from ops.sample_calls import tensors_in
from torch import Tensor

from .inputs import Case

NEAR = 1e-4
"""Relative distance from a threshold within which float32 may decide either way. Near cases are counted."""


class Mismatch(AssertionError):
    """A backend's result differs from the oracle's."""


@dataclass
class Answer:
    """A backend's result for a case."""

    tensors: list[Tensor] = field(default_factory=list)
    problem: str | None = None  # raised, crashed, or wrote out of bounds


@dataclass(frozen=True)
class Family:
    """Fuzzer interface of one operator.

    Args:
        op: name of the operator.
        strategy: generates descriptions.
        build: description -> new arguments of the operator by name.
        check: (description, arguments, cache of the oracle's results, answer) -> whether the case was near a threshold;
            raises an AssertionError on any difference that nearness does not explain.
        in_place: arguments whose tensors the operator modifies; they are the answer.
        function: takes the arguments and `backend`. Default: the operator of that name.
        kinds: description -> its features, for the record. Default: those of an operator's tensors.
    """

    op: str
    strategy: SearchStrategy[Case]
    build: Callable[[Case], dict[str, Any]]
    check: Callable[[Case, dict[str, Any], dict[str, Any], list[Tensor]], bool]
    in_place: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None
    kinds: Callable[[Case], list[str]] | None = None

    def changed(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The tensors that a call modifies."""
        return [t for name in self.in_place for t in arguments[name]]

    def compute(self, case: Case, call: Callable[..., Any]) -> Answer:
        """Build the case, call the operator, check for out-of-bounds writes."""
        arguments = self.build(case)
        changed = self.changed(arguments)
        inputs = [t for t in tensors_in(arguments) if not any(t is c for c in changed)]
        read_only, writable = Watch(*inputs), Watch(*changed)
        try:
            result = call(**arguments)
        except Exception as error:
            return Answer(problem=f"raised {type(error).__name__}: {error}")
        if not read_only.nothing_changed():
            return Answer(problem="an input was written to")
        if changed and not writable.outside_unchanged():
            return Answer(problem="a byte outside the caches was written")
        if self.in_place:
            return Answer([t.clone(memory_format=torch.contiguous_format) for t in changed])
        return Answer([result] if isinstance(result, Tensor) else list(result))
