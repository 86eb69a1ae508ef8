# SPDX-License-Identifier: Apache-2.0
"""Search for mismatches: generates cases, computes them on all backends, compares, and shrinks failures."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure
from hypothesis.reporting import with_reporter
from torch import Tensor

from mustdrop_kernels.files import write_text

from .family import Family, Mismatch
from .inputs import Case
from .runners import Runner, takes

REGRESSIONS = Path(__file__).parent / "regressions"
BLOCK = 250
"""Cases per hypothesis run; a failure ends its block."""


@dataclass
class Failure:
    """A shrunk case on which a backend differs."""

    backend: str
    message: str
    case: Case

    def save(self, folder: Path) -> Path:
        """Write a file that the regression test replays."""
        text = json.dumps(self.case, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case['op']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
        document = {"backend": self.backend, "message": self.message, "case": self.case}
        write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
        return path


@dataclass
class Tally:
    """Statistics of an operator's cases."""

    op: str
    cases: int = 0
    shrinking: int = 0  # cases tried while shrinking
    by_runner: Counter[str] = field(default_factory=Counter)
    near: Counter[str] = field(default_factory=Counter)  # cases near a threshold
    kinds: Counter[str] = field(default_factory=Counter)  # features of the cases
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "cases": self.cases,
            "by_runner": dict(self.by_runner),
            "mismatches": len(self.failures),
            "near_threshold": dict(self.near),
            "shrinking": self.shrinking,
            "kinds": dict(self.kinds.most_common()),
            "seconds": round(self.seconds, 1),
            "failures": [{"backend": f.backend, "message": f.message, "case": f.case} for f in self.failures],
        }


def compare(family: Family, case: Case, runners: Sequence[Runner]) -> dict[str, bool]:
    """Compare a case on all backends. Returns backend -> whether the case was near a threshold.

    Raises:
        Mismatch: a backend differs from the oracle, or two from each other; its attribute `runner` names it.
    """
    for runner in runners:
        runner.start(case)
    answers = {runner.name: runner.answer(family, case) for runner in runners}  # all: no pipe may hold a stale one
    arguments = family.build(case)
    memo: dict[str, Any] = {}
    near = {}
    for name, answer in answers.items():
        try:
            assert answer.problem is None, answer.problem
            near[name] = family.check(case, arguments, memo, answer.tensors)
        except Exception as error:  # errors of the check itself included: one case must not end the run
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            mismatch = Mismatch(f"{name}: {what}")
            mismatch.runner = name  # type: ignore[attr-defined]
            raise mismatch from None
    if not any(near.values()) and len(answers) > 1:
        _agree(family, {name: answer.tensors for name, answer in answers.items()})
    return near


def _agree(family: Family, answers: dict[str, list[Tensor]]) -> None:
    """Check that all backends make equal decisions. (Floats are each within a tolerance of the oracle's.)"""
    if family.in_place:
        return  # specified slots have been compared bit by bit; the others are arbitrary
    first, *others = answers
    for other in others:
        for i, (a, b) in enumerate(zip(answers[first], answers[other], strict=True)):
            same = a.dtype == b.dtype and a.shape == b.shape
            if same and not a.is_floating_point() and not a.is_complex():
                same = bool(np.array_equal(a.numpy(), b.numpy()))
            if not same:
                mismatch = Mismatch(f"{other} and {first} differ in result {i}")
                mismatch.runner = other  # type: ignore[attr-defined]
                raise mismatch


def kinds_of(case: Case) -> list[str]:
    """Features of a case, for the record."""
    found = [str(case["dtype"])]
    text = json.dumps(case)
    found += [name for name in ("inf", "nan", "rubbish", "bad_blocks", "merged_first", "align_end") if _has(case, name)]
    if '"order"' in text or '"interleaved": "' in text:
        found.append("views")
    if '"expand"' in text:
        found.append("expanded")
    sizes = [*case.get("shape", []), *case.get("grid", [1]), case.get("batch", 1), case.get("length", 1)]
    if 0 in sizes or case.get("lengths") == []:
        found.append("empty")
    return found


def _has(case: Case, name: str) -> bool:
    if isinstance(case.get("keep"), dict) and case["keep"].get(name):
        return True
    return bool(case.get(name)) or name in json.dumps([case.get("special"), case.get("thresholds")])


class _Trial:
    """Cases of one block. After a failure the failing backend takes every case, so that it is used for shrinking."""

    def __init__(self, family: Family, runners: Sequence[Runner], tally: Tally) -> None:
        self.family, self.runners, self.tally = family, runners, tally
        self.failed: str | None = None
        self.last: Failure | None = None

    def __call__(self, described: Case) -> None:
        case = {"op": self.family.op, **described}
        if self.failed is None:
            chosen = [p for p in self.runners if takes(p, case)]
        else:
            # The failing backend, and one to compare it with.
            chosen = [p for p in self.runners if p.name == self.failed or p is self.runners[0]]
        try:
            near = compare(self.family, case, chosen)
        except Mismatch as mismatch:
            self.failed = mismatch.runner  # type: ignore[attr-defined]
            self.last = Failure(self.failed, str(mismatch), case)
            raise
        if self.failed is not None:
            self.tally.shrinking += 1
            return
        self.tally.cases += 1
        self.tally.by_runner.update(near.keys())
        self.tally.near.update(name for name, is_near in near.items() if is_near)
        self.tally.kinds.update((self.family.kinds or kinds_of)(case))


def search(
    family: Family,
    runners: Sequence[Runner],
    cases: int,
    seed: int,
    *,
    until: float = float("inf"),
    most_failures: int = 5,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Try `cases` cases, or stop at the time `until` (of time.monotonic) or after the maximum number of failures.

    The same seed generates the same cases.
    """
    tally, begin, block = Tally(family.op), time.monotonic(), 0
    while tally.cases < cases and time.monotonic() < until and len(tally.failures) < most_failures:
        trial = _Trial(family, runners, tally)
        failure = _run_block(trial, min(BLOCK, cases - tally.cases), seed * 1_000_003 + block)
        if failure is not None:
            tally.failures.append(failure)
        block += 1
        tally.seconds = time.monotonic() - begin
        tell(tally)
    return tally


def _run_block(trial: _Trial, cases: int, seed: int) -> Failure | None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=cases, database=None, deadline=None, derandomize=False, report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(trial.family.strategy)
    def attempt(described: Case) -> None:
        trial(described)

    try:
        with with_reporter(lambda text: None):
            attempt()
    except Mismatch:
        return trial.last  # the last failure is the smallest
    except FlakyFailure:
        assert trial.last is not None
        trial.last.message = f"flaky: {trial.last.message}"
        return trial.last
    return None


def replay(path: Path, family: Family, runners: Sequence[Runner]) -> None:
    """Compare a stored case again.

    Raises:
        Mismatch: a backend still differs.
    """
    compare(family, json.loads(path.read_text())["case"], runners)
