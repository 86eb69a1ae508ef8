# SPDX-License-Identifier: Apache-2.0
"""Baseline of an operator, and its compiled form."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from ..cases import Canonical, Case, Inputs, Raw

Call = Callable[[Inputs], Raw]


def _serves(case: Case) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another way to compute what some operators compute."""

    name: str
    ops: tuple[str, ...]
    build: Callable[[Case], Call]  # for this case; the returned function is timed
    what: str  # one sentence
    # The result to compare with the operator's; None: the baseline computes something else.
    canonical: Callable[[Raw, Inputs], Canonical] | None
    why_not: Callable[[Case], str | None] = _serves
    scratch: Callable[[Case], int] = lambda case: 0  # bytes of temporary memory
    in_place: bool = False
    compiles: bool = False
    detail: Callable[[Inputs], str] | None = (
        None  # details that depend on the inputs, such as the kernel that torch chooses
    )


def for_case(compute: Callable[[Case, Inputs], Raw]) -> Callable[[Case], Call]:
    """The ``build`` of a baseline that prepares nothing for a case."""
    # A method, not a lambda: torch.compile runs what it inlines into another frame without a graph if the graph breaks.
    return lambda case: MethodType(compute, case)


def compiled(baseline: Baseline) -> Baseline:
    """torch.compile of a baseline."""

    def build(case: Case) -> Call:
        torch._dynamo.reset()  # each case compiles separately: no recompilation limit, no dynamic sizes
        eager = baseline.build(case)
        return torch.compile(eager, dynamic=False)

    def why_not(case: Case) -> str | None:
        reason = baseline.why_not(case)
        if reason is None and case.device.type == "cpu" and shutil.which("g++") is None:
            reason = "torch.compile needs a C++ compiler"
        return reason

    return dataclasses.replace(
        baseline, name=f"compile({baseline.name})", build=build, why_not=why_not, compiles=True,
        what=f"torch.compile of: {baseline.what}",
    )  # fmt: skip


def as_pair(raw: Any, inputs: Inputs) -> Canonical:
    """(total, peak)."""
    return {"total": raw[0], "peak": raw[1]}
