# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on the emulated kernels in processes of their own: under AddressSanitizer, and in other orders.

`make test` runs it in its own process too, looking for races, as one more backend of tests/ops (see its conftest).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from cuda_emulation import NAME, building

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))


def run_suite(sanitizer: str, *, sample: int, seed: int = 0, capability: str = "") -> int:
    """How many tests passed; all that were run have to."""
    building.build_library(sanitizer)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        **building.preload(sanitizer),
        "MUSTDROP_TEST_BACKENDS": NAME,
        "MUSTDROP_EMULATION_SANITIZER": sanitizer,
        "MUSTDROP_EMULATION_SAMPLE": str(sample),
        "MUSTDROP_EMULATION_SEED": str(seed),
        "MUSTDROP_EMULATION_CAPABILITY": capability,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", NAME, "tests/ops"]
    done = subprocess.run(command, cwd=building.ROOT, env=environment, capture_output=True, text=True)
    said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, said
    return int(passed[1])


def test_addresses():
    """A sample of every test's cases; what it looks for does not depend on the order of the threads."""
    assert run_suite("address", sample=32) > 100


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("sanitizer", "seed"), [("address", 1), ("races", 2), ("races", 3)])
def test_everything(sanitizer, seed, capability):
    assert run_suite(sanitizer, sample=1, seed=seed, capability=capability) > 400
