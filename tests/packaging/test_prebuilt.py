# SPDX-License-Identifier: Apache-2.0
"""Prebuilt libraries are used if they were built from the same sources, and rebuilt otherwise."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import run_python

from mustdrop_kernels import _load, _sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources and stand-ins for libraries built for targets 80 and 90; there is no CMake."""
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    library = tmp_path / "mustdrop_kernels" / "lib"
    library.mkdir(parents=True)
    for name in ("__init__.py", "_sources.py"):
        shutil.copy(ROOT / "mustdrop_kernels" / name, tmp_path / "mustdrop_kernels" / name)
    for name in _sources.LIBRARIES:
        (library / name).write_text("prebuilt")
    _sources.write_record(library, tmp_path, ["80", "90"], "")
    return tmp_path


def build(tree: Path, archs: str = "90", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `setup.py build_ext --inplace` without CMake, so that a build fails."""
    stub = "import shutil; shutil.which = lambda *a, **k: None; import runpy, sys; sys.argv = sys.argv[1:]; "
    words = ("-c", f"{stub}runpy.run_path('setup.py', run_name='__main__')", "setup.py", "-q", "build_ext", "--inplace")
    return run_python(*words, folder=tree, MUSTDROP_CUDA_ARCHS=archs, PATH="/nowhere", **environment)


@pytest.mark.parametrize("archs", ["90", "80;90", ""])
def test_libraries_of_the_same_sources_are_used(tree: Path, archs: str) -> None:
    done = build(tree, archs)
    assert done.returncode == 0, done.stderr
    assert "were built from these sources and are used" in done.stdout
    assert (tree / "mustdrop_kernels" / "lib" / "libmustdrop_cuda.so").read_text() == "prebuilt"


def test_other_sources_targets_and_arguments_are_built(tree: Path) -> None:
    def is_built(**how: str) -> bool:
        done = build(tree, **how)
        return done.returncode != 0 and "CMake was not found" in done.stderr

    assert is_built(archs="120")
    assert is_built(MUSTDROP_CMAKE_ARGS="-DMUSTDROP_WERROR=ON")
    assert not is_built()
    header = tree / "csrc" / "common" / "device.cuh"
    text = header.read_text()
    header.write_text(text + "\n")
    assert is_built()
    header.write_text(text)
    assert not is_built()
    (tree / "mustdrop_kernels" / "lib" / "libmustdrop_nvrtc.so").unlink()
    assert is_built()


def test_the_digest_covers_every_file(tree: Path) -> None:
    seen = {_sources.digest(tree)}
    for name in ("csrc/schemas.cpp", "csrc/select/kernel.cuh", "python/native.cpp", "CMakeLists.txt", "setup.py"):
        path = tree / name
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(_sources.digest(tree))
    (tree / "csrc" / "select" / "kernel.cuh").rename(tree / "csrc" / "select" / "other.cuh")
    seen.add(_sources.digest(tree))
    assert len(seen) == 7
    assert _sources.digest(tree / "mustdrop_kernels") is None


def test_the_libraries_of_this_tree_have_a_record() -> None:
    record = _sources.record(_load.LIBRARY_FOLDER)
    assert record is not None
    assert record["sources"] == _sources.digest(ROOT)


@pytest.mark.parametrize("text", ["", "[]", "{", None])
def test_invalid_record(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / _sources.RECORD).write_text(text)
    assert _sources.record(tmp_path) is None
    assert not _sources.made_of_these(tmp_path, ROOT, [])


def test_doctor_shows_the_digest() -> None:
    done = run_python("-m", "mustdrop_kernels", "doctor", "--json", folder=ROOT)
    sources = json.loads(done.stdout)["sources"]
    assert sources["libraries_of"] == _sources.digest(ROOT)
    assert sources["same"] is True
