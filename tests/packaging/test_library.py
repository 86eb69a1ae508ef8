# SPDX-License-Identifier: Apache-2.0
"""libmustdrop is one binary for every torch and every Python: it asks of the system only what is on this page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import mustdrop_kernels
from mustdrop_kernels import _load

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")

STABLE_ABI = re.compile(r"(aoti_torch_|torch_)\w+$")
CPP_RUNTIME = re.compile(r".*@(GLIBCXX|CXXABI|GCC)_[\d.]+$")
C_LIBRARY = re.compile(r"\w+@GLIBC_[\d.]+$")
LINKER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols(library: Path) -> list[str]:
    lines = output_of("nm", "-D", "--undefined-only", library).splitlines()
    return [line.split(maxsplit=1)[1].strip() for line in lines]


def test_only_the_stable_abi_is_asked_of_torch() -> None:
    allowed = (STABLE_ABI, CPP_RUNTIME, C_LIBRARY)
    strange = [
        s for s in undefined_symbols(_load.core.path) if s not in LINKER and not any(p.match(s) for p in allowed)
    ]
    assert not strange


def test_no_python_symbol() -> None:
    assert not [s for s in undefined_symbols(_load.core.path) if s.startswith(("Py", "_Py"))]


def test_needs_no_torch_python_and_has_no_path_of_the_build_machine() -> None:
    dynamic = output_of("readelf", "-d", _load.core.path)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert str(ROOT).encode() not in _load.core.path.read_bytes()


def test_instruction_set_levels_share_no_symbol() -> None:
    """A function that two levels define alike would be merged by the linker: newer instructions on older machines."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/mustdrop_cpu_*.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder here: this is an installed package")
    for file in objects:
        level = re.search(r"mustdrop_cpu_(\w+)\.dir", str(file))
        assert level is not None
        for line in output_of("nm", "-C", "--defined-only", "--extern-only", file).splitlines():
            name = line.split(maxsplit=2)[2]
            assert f"mustdrop::cpu::{level[1]}::" in name, f"{file.name} ({level[1]}) defines {name}"


def test_native_describes_the_build() -> None:
    native = pytest.importorskip("mustdrop_kernels._native", reason="built without pybind11")
    assert native.version == mustdrop_kernels.__version__
    assert native.torch_target_version == "2.10"
    assert "baseline" in native.cpu_levels
    assert isinstance(native.cuda_archs, tuple)
