# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance suite of tests/ops on the emulated kernels in a separate process."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from processes import run_python

from . import building
from .backend import NAME


def run_suite(
    sanitizer: str,
    *,
    sample: int,
    seed: int = 0,
    capability: str = "",
    root: Path = building.ROOT,
    tests: Sequence[str] = ("tests/ops",),
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """A finished pytest process. `sample`: one case in `sample` runs; `root`: the source tree of the kernels."""
    building.build_library(sanitizer, root)
    environment = {
        **building.preload(sanitizer),
        "MUSTDROP_TEST_BACKENDS": NAME,
        "MUSTDROP_EMULATION_SANITIZER": sanitizer,
        "MUSTDROP_EMULATION_SAMPLE": str(sample),
        "MUSTDROP_EMULATION_SEED": str(seed),
        "MUSTDROP_EMULATION_CAPABILITY": capability,
        "MUSTDROP_EMULATION_ROOT": str(root),
    }
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", f"{NAME} or test_paths"]
    return run_python(*words, *options, *tests, folder=building.ROOT, without="PYTEST_", **environment)


def passed(done: subprocess.CompletedProcess) -> int:
    """The number of tests that passed; fails if one did not."""
    output = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, output
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, output
    return int(found[1])
