# SPDX-License-Identifier: Apache-2.0
"""Each library is one binary for every torch and Python: its undefined symbols are those of library_symbols.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from library_symbols import (
    NEEDED,
    NEEDED_BY_CUDA,
    has_search_path,
    needed,
    output_of,
    strange_symbols,
    undefined_symbols,
)

import mustdrop_kernels
from mustdrop_kernels import _load

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = [library.path for library in (_load.core, _load.nvrtc, _load.cuda) if library.path.is_file()]
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
every_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)


@every_library
def test_only_the_stable_abi_of_torch_is_used(library: Path) -> None:
    assert not strange_symbols(library)


@every_library
def test_no_python_symbol(library: Path) -> None:
    assert not [s for s in undefined_symbols(library) if s.startswith(("Py", "_Py"))]


@every_library
def test_needs_no_torch_python_and_has_no_path_of_the_build_machine(library: Path) -> None:
    assert needed(library) <= NEEDED | (NEEDED_BY_CUDA if library == _load.cuda.path else set())
    assert not has_search_path(library)
    if library != _load.cuda.path:  # line numbers for profilers contain paths; wheels are built without them
        assert str(ROOT).encode() not in library.read_bytes()


def test_the_audit_finds_symbols_that_are_not_allowed(tmp_path: Path) -> None:
    """A library that uses torch's C++ API and Python fails for both."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "bad.cpp", tmp_path / "libbad.so"
    source.write_text(
        'extern "C" int Py_IsInitialized(); namespace at { int get_num_threads(); }\n'
        "int bad() { return Py_IsInitialized() + at::get_num_threads(); }\n"
    )
    output_of(compiler, "-shared", "-fPIC", source, "-o", library)
    assert {"Py_IsInitialized", "_ZN2at15get_num_threadsEv"} <= set(strange_symbols(library))


def test_instruction_set_levels_share_no_symbol() -> None:
    """The linker would merge a function that two levels define, and run newer instructions on older machines."""
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
