# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance suite of tests/ops on the emulated kernels, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    """A pytest process. `sample`: one case in so many; `root`: whose csrc/ the kernels are taken from."""
    building.build_library(sanitizer, root)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        **building.preload(sanitizer),
        "MUSTDROP_TEST_BACKENDS": NAME,
        "MUSTDROP_EMULATION_SANITIZER": sanitizer,
        "MUSTDROP_EMULATION_SAMPLE": str(sample),
        "MUSTDROP_EMULATION_SEED": str(seed),
        "MUSTDROP_EMULATION_CAPABILITY": capability,
        "MUSTDROP_EMULATION_ROOT": str(root),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["-k", f"{NAME} or test_paths", *options, *tests]
    return subprocess.run(command, cwd=building.ROOT, env=environment, capture_output=True, text=True)


def passed(done: subprocess.CompletedProcess) -> int:
    """How many tests passed; all that were run have to."""
    said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, said
    return int(found[1])
