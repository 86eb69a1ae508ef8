# SPDX-License-Identifier: Apache-2.0
"""Limit of a kernel's dynamic shared memory: threads conflict if each launch sets it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from processes import run_python

from cuda_emulation import building

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not())),
]
RAISED_ONCE = re.compile(
    r"kernel\.state->raise_limit_once\(\s*cuda_emulation::device\(\),\s*\[&\] \{.*?\}\);", re.DOTALL
)


def concurrency_with(launcher: str, root) -> subprocess.CompletedProcess:
    """Run tests/test_concurrency.py with this text as csrc/common/launch.h."""
    shutil.copytree(building.ROOT / "csrc", root / "csrc")
    (root / "csrc" / "common" / "launch.h").write_text(launcher)
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_concurrency.py")
    chosen = ("-k", "differ and cuda_emulated")
    return run_python(*words, *chosen, folder=building.ROOT, without="PYTEST_", MUSTDROP_EMULATION_ROOT=str(root))


@pytest.mark.parametrize(
    "instead",
    [
        "cuda_emulation::set_shared_limit(kernel.address(), grid.shared_bytes);",  # each launch its own size
        "",  # never
    ],
)
def test_a_launcher_that_does_not_raise_it_once_fails(instead, tmp_path):
    launcher = (building.ROOT / "csrc" / "common" / "launch.h").read_text()
    changed, count = RAISED_ONCE.subn(instead, launcher)
    assert count == 1
    done = concurrency_with(changed, tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "more shared memory than the kernel's attribute allows" in done.stdout
