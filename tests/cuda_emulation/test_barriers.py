# SPDX-License-Identifier: Apache-2.0
"""Mutation test of barriers: the suite fails without any single barrier of the kernels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_emulation import building
from cuda_emulation.suite import run_suite

CSRC = building.ROOT / "csrc"
OPS_TESTS = building.ROOT / "tests" / "ops"
BARRIER = re.compile(r"\b(__syncthreads|__syncwarp|\w+_barrier|\w+_barrier_relaxed|wait_for_previous)\(\);")
CAUGHT = re.compile(r"cuda_emulation: |AssertionError|assert ")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not())),
]


class Place(NamedTuple):
    file: str  # below csrc/
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def barriers() -> Iterator[Place]:
    """The calls in the headers of kernels, except those that define another barrier."""
    for path in sorted(CSRC.glob("*/*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if BARRIER.search(line) and not re.search(r"\bvoid \w+\(", line):
                yield Place(str(path.relative_to(CSRC)), number)


def without(place: Place, root: Path) -> None:
    """Copy csrc/ to `root` without this barrier."""
    shutil.copytree(CSRC, root / "csrc")
    path = root / "csrc" / place.file
    lines = path.read_text().splitlines(keepends=True)
    lines[place.line - 1] = BARRIER.sub(";", lines[place.line - 1], count=1)
    path.write_text("".join(lines))


def suite_for(place: Place) -> list[str]:
    """The tests that call an operator of the header's folder; all tests for a shared header."""
    launchers = "".join(path.read_text() for path in (CSRC / place.file).parent.glob("cuda*.cu"))
    ops = re.findall(r'm\.impl\("(\w+)"', launchers)
    large = "tests/cuda_emulation/test_paths.py"
    if not ops:
        return ["tests/ops", large]
    calls = re.compile(rf"\bbackend\.({'|'.join(ops)})\(")
    files = [str(path) for path in sorted(OPS_TESTS.glob("test_*.py")) if calls.search(path.read_text())]
    return [*files, large]


@pytest.mark.parametrize("place", barriers(), ids=str)
def test_a_missing_barrier_is_caught(place, tmp_path):
    without(place, tmp_path)
    done = run_suite("races", sample=8, root=tmp_path, tests=suite_for(place), options=["-x"])
    assert done.returncode == 1, f"no test fails without {place}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert CAUGHT.search(done.stdout), done.stdout[-3000:]
