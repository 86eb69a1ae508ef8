# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer needs to know of an operator, and how a case is computed by somebody."""

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
"""Relative distance from a threshold within which float32 may decide either way. Such cases are counted."""


class Mismatch(AssertionError):
    """Somebody's answer is not the oracle's."""


@dataclass
class Answer:
    """What somebody made of a case."""

    tensors: list[Tensor] = field(default_factory=list)
    problem: str | None = None  # raised, died, or wrote where nobody may write


@dataclass(frozen=True)
class Family:
    """One operator.

    Args:
        op: its name.
        strategy: draws descriptions.
        build: the operator's arguments by name, new ones for each call.
        judge: (description, arguments, what the oracle needs only once, answer) -> whether the case was near a
            threshold; raises an AssertionError on any difference that nearness does not explain.
        in_place: arguments whose tensors the operator changes; they are the answer.
    """

    op: str
    strategy: SearchStrategy[Case]
    build: Callable[[Case], dict[str, Any]]
    judge: Callable[[Case, dict[str, Any], dict[str, Any], list[Tensor]], bool]
    in_place: tuple[str, ...] = ()

    def changed(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The tensors that a call changes."""
        return [t for name in self.in_place for t in arguments[name]]

    def compute(self, case: Case, call: Callable[..., Any]) -> Answer:
        """Build the case, call the operator, look for writes outside."""
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
