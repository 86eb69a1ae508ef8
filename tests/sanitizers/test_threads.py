# SPDX-License-Identifier: Apache-2.0
"""The CPU library under ThreadSanitizer, called from C++ threads. A stub (stub/) replaces torch's stable ABI, so that
the whole process is instrumented."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mustdrop_kernels import _load

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "threads"
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mbmi2"],
}
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def find_ninja() -> str | None:
    return shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or find_ninja() is None, reason="needs g++ and ninja"),
]


@pytest.fixture(scope="module")
def driver() -> Path:
    """The driver and the library in one program, compiled by ninja."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    include = [f"-I{HERE / 'stub'}", f"-I{ROOT / 'csrc'}", f"-isystem{Path(spec.origin).parent / 'include'}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = [
        f"rule cxx\n  command = g++ {' '.join(FLAGS + include)} $more -MD -MF $out.d -c $in -o $out\n  depfile = $out.d"
    ]
    lines += ["rule link\n  command = g++ -fsanitize=thread $in -o $out -pthread"]
    objects = []

    def add(source: Path, name: str, more: list[str]) -> None:
        objects.append(name)
        lines.append(f"build {name}: cxx {source}\n  more = {' '.join(more)}")

    kernels = sorted((ROOT / "csrc").glob("*/cpu_kernel*.cpp"))
    for source in sorted({*(ROOT / "csrc").glob("*/cpu.cpp"), *(ROOT / "csrc").glob("*/cpu_*.cpp")} - set(kernels)):
        add(source, f"{source.parent.name}-{source.stem}.o", [])
    for source in kernels:
        for level, flags in LEVELS.items():
            name = f"{source.parent.name}-{source.stem}-{level}.o"
            add(source, name, [*flags, f"-DMUSTDROP_CPU_LEVEL={level}"])
    add(HERE / "threads.cpp", "threads.o", [])
    lines.append(f"build threads: link {' '.join(objects)}\n")
    (BUILD / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run(
        [str(find_ninja()), "-C", str(BUILD), "-j", str(os.cpu_count())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return BUILD / "threads"


def run(driver: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=0 exitcode=66", **environment}
    # ThreadSanitizer of older compilers does not support the address space randomization of newer kernels.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*prefix, str(driver), *words], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("level", LEVELS)
def test_no_race_and_the_same_results(driver: Path, level: str) -> None:
    names = list(LEVELS)
    best = str(_load.cpu_capability()).removesuffix("_bf16")
    if best not in names or names.index(level) > names.index(best):
        pytest.skip(f"this machine has {best}")
    done = run(driver, MUSTDROP_CPU_CAPABILITY=level)
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[:4000]
    assert done.returncode == 0, done.stdout + done.stderr[:2000]
    assert "0 results differ" in done.stdout


def test_a_planted_race_is_reported(driver: Path) -> None:
    options = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    done = run(driver, "planted", MUSTDROP_CPU_CAPABILITY="baseline", **options)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert done.returncode != 0
