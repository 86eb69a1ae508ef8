# SPDX-License-Identifier: Apache-2.0
"""The emulation catches what it is there for: real kernels with a barrier or a bound taken out, and broken rules of CUDA."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import build as building

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=building.why_not() or "")

SEEDS = 6


@pytest.fixture(scope="session")
def compile_with(tmp_path_factory):
    """A function from replacements {header: (old, new)} to the compiled program, sanitizers on."""

    def compile_mutant(header: str | None = None, old: str = "", new: str = "") -> Path:
        folder = tmp_path_factory.mktemp("mutant")
        for name in ("common/device.cuh", "compact_kv/kernel.cuh", "gather/kernel.cuh"):
            text = (building.ROOT / "csrc" / name).read_text()
            if name == header:
                assert text.count(old) == 1, f"{name} does not hold {old!r} once: adapt the test"
                text = text.replace(old, new)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        here = building.HERE
        command = [
            building.compiler(), "-std=c++17", "-O1", "-g1", "-Wno-unknown-pragmas", "-DMUSTDROP_CUDA_EMULATED",
            *building.SANITIZERS["address"], f"-I{folder}", f"-I{here}", "-include", str(here / "cuda_emulation.h"),
            str(here / "mutants.cpp"), str(here / "scheduler.cpp"), "-o", str(folder / "mutants"),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        return folder / "mutants"

    return compile_mutant


@pytest.fixture(scope="session")
def correct(compile_with) -> Path:
    return compile_with()


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("kernel", ["compact", "gather"])
def test_the_kernels_as_they_are(correct, kernel):
    done = run(correct, kernel, str(SEEDS))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("comment", ["all loads of `tile` are done", "all loads of `tile + 1` are done"])
def test_a_missing_barrier_is_caught(compile_with, comment):
    mutant = compile_with("compact_kv/kernel.cuh", f"__syncthreads();  // {comment}", "")
    done = run(mutant, "compact", str(SEEDS))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no seed shows the missing barrier"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (at < p.pieces) to[at] = held[u];", "if (at <= p.pieces) to[at] = held[u];"),
        ("if (token >= p.tokens) return;", "if (token > p.tokens) return;"),
    ],
)
def test_a_store_outside_is_caught(compile_with, old, new):
    done = run(compile_with("gather/kernel.cuh", old, new), "gather", "1")
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent", "different operations"),
        ("left", "__syncthreads"),
        ("unwaited", "copies that it has not waited for"),
        ("rank", "rank outside the cluster"),
        ("shared", "heap-buffer-overflow"),
    ],
)
def test_broken_rules_are_reported(correct, name, message):
    done = run(correct, name)
    assert done.returncode != 0 and message in done.stderr, done.stderr
