# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on the emulated CUDA kernels: under AddressSanitizer, other seeds, with and without clusters.

The sanitizer's runtime has to be in the process from its start, so the suite runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from . import build as building

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(building.why_not() is not None, reason=building.why_not() or ""),
]

SUITES = {
    "moves": ["test_gather.py", "test_compact_kv.py"],
    "select": ["test_select.py", "test_spatial_merge.py"],
}


def preload() -> str:
    """The sanitizers' runtimes, and libstdc++ so that AddressSanitizer finds the functions that it wraps."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [building.compiler() or "g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        for name in names
    ]
    return ":".join(done.stdout.strip() for done in found)


def run_suite(suite: str, seed: int, capability: int, sanitizer: str) -> None:
    environment = os.environ | {
        "MUSTDROP_CUDA_EMULATION": "1",
        "MUSTDROP_TEST_BACKENDS": "cuda_emulated",
        "MUSTDROP_EMULATION_SANITIZER": sanitizer,
        "MUSTDROP_EMULATION_SEED": str(seed),
        "MUSTDROP_EMULATION_CAPABILITY": str(capability),
        "PYTHONPATH": os.pathsep.join([str(building.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of a run that this one is part of
    if sanitizer == "address":
        building.build(sanitizer)  # the compiler does not need the runtime
        environment["LD_PRELOAD"] = preload()
        environment["ASAN_OPTIONS"] = "detect_leaks=0:alloc_dealloc_mismatch=0"
    files = [str(building.ROOT / "tests" / "ops" / name) for name in SUITES[suite]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=building.ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("suite", SUITES)
def test_under_address_sanitizer(suite):
    run_suite(suite, seed=1, capability=90, sanitizer="address")


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("seed", "capability"), [(2, 80), (3, 90), (4, 80)])
def test_other_orders_of_the_threads(suite, seed, capability):
    run_suite(suite, seed, capability, sanitizer="undefined")
