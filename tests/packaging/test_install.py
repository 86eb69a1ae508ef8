# SPDX-License-Identifier: Apache-2.0
"""`pip install .`, the build of the CUDA library if nvcc is found, and wheels."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from library_symbols import NEEDED, NEEDED_BY_CUDA, needed, strange_symbols, undefined_symbols
from processes import output_of_python

from mustdrop_kernels.backends import OPS

ROOT = Path(__file__).resolve().parents[2]
LIB = {"libmustdrop.so", "libmustdrop_nvrtc.so", "build.json", "kernels"}
pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not in a source checkout")
SOURCES = ("csrc", "python", "mustdrop_kernels", "setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
SOURCES += ("MANIFEST.in", "CHANGELOG.md")


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "lib")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def pip_install(source: Path, target: Path, **environment: str) -> None:
    words = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source)
    output_of_python(*words, **{"MUSTDROP_CUDA_ARCHS": "", **environment})


def call_installed(target: Path) -> None:
    """Call an operator of the package in `target`."""
    code = f"""
import mustdrop_kernels as mk, torch
assert mk.__file__.startswith({str(target)!r}), mk.__file__
assert torch.ops.mustdrop.spatial_merge(torch.ones(1, 5, 4), [2, 2], [2, 2])[1].tolist() == [2]
"""
    output_of_python("-c", code, folder=target.parent, PYTHONPATH=str(target))


@pytest.mark.slow
def test_pip_install_gives_a_working_package(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    target = tmp_path / "site"
    pip_install(copy_sources(tmp_path / "source"), target)
    assert {p.name for p in (target / "mustdrop_kernels" / "lib").iterdir()} == LIB
    call_installed(target)


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
def test_the_same_build_compiles_the_cuda_library(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    target = tmp_path / "site"
    pip_install(copy_sources(tmp_path / "source"), target, MUSTDROP_CUDA_ARCHS="80")
    library = target / "mustdrop_kernels" / "lib" / "libmustdrop_cuda.so"
    assert "aoti_torch_get_current_cuda_stream" in undefined_symbols(library)
    assert not strange_symbols(library)
    assert needed(library) <= NEEDED | NEEDED_BY_CUDA
    assert "libtorch_cuda.so" in needed(library)  # it holds the stream's function, outside the global scope
    assert [op for op in OPS if op.encode() not in library.read_bytes()] == []
    # A CPU-only torch reports why the library is not used.
    code = "from mustdrop_kernels import _load; print(_load.core.loaded, _load.cuda.problem)"
    assert output_of_python("-c", code, folder=tmp_path, PYTHONPATH=str(target)).startswith("True")


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Globals of setup.py, run with a stub of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_targets_without_nvcc_raise(setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_arguments = setup_script["cuda_arguments"]
    monkeypatch.setitem(cuda_arguments.__globals__, "find_nvcc", lambda: None)
    monkeypatch.setenv("MUSTDROP_CUDA_ARCHS", "80")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        cuda_arguments()


def test_targets_default_to_the_gpus_present(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_arguments = setup_script["cuda_arguments"]
    monkeypatch.delenv("MUSTDROP_CUDA_ARCHS", raising=False)
    monkeypatch.setitem(cuda_arguments.__globals__, "archs_of_gpus_present", lambda: "")
    assert cuda_arguments() == []
    assert "no CUDA library" in capsys.readouterr().out
    monkeypatch.setitem(cuda_arguments.__globals__, "archs_of_gpus_present", lambda: "90")
    monkeypatch.setitem(cuda_arguments.__globals__, "find_nvcc", lambda: "/opt/nvcc")
    assert cuda_arguments() == ["-DMUSTDROP_CUDA_ARCHS=90", "-DCMAKE_CUDA_COMPILER=/opt/nvcc"]


# ------------------------------------------------------------------------------------------------ wheels


def build(source: Path, out: Path, *what: str, **environment: str) -> Path:
    """Run `python -m build` and return the file that it creates."""
    pytest.importorskip("build")
    words = ("-m", "build", "--no-isolation", *what, "-o", out, source)
    output_of_python(*words, **{"MUSTDROP_CUDA_ARCHS": "", **environment})
    (made,) = out.iterdir()
    return made


def install_and_run(wheel: Path, target: Path) -> None:
    """Install a wheel in an environment without compilers, and call one of its operators."""
    empty = target.parent / "no_compiler"
    empty.mkdir()
    words = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    output_of_python(*words, PATH=str(empty), CXX="")
    call_installed(target)


@pytest.mark.slow
def test_one_wheel_from_the_sdist_for_every_python(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    sdist = build(copy_sources(tmp_path / "source"), tmp_path / "sdist", "--sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build(unpacked, tmp_path / "wheels", "--wheel", MUSTDROP_PORTABLE="1")
    assert re.match(r"mustdrop_kernels-[\d.]+-py3-none-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"mustdrop_kernels/lib/{name}" for name in LIB if name.endswith(".so")} <= set(names)
    assert "mustdrop_kernels/lib/kernels/common/device.cuh" in names
    assert "mustdrop_kernels/lib/kernels/common/token_types.h" in names
    assert not [name for name in names if "_native" in name]
    install_and_run(wheel, tmp_path / "site")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
def test_make_wheel_names_the_oldest_system(tmp_path: Path) -> None:
    """`make wheel` puts the platform tag that auditwheel determines into the name."""
    pytest.importorskip("auditwheel")
    subprocess.run(["make", "-C", str(ROOT), "wheel", f"DIST={tmp_path}"], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.match(r"mustdrop_kernels-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl$", wheel.name)
    install_and_run(wheel, tmp_path / "site")


def test_a_wheel_with_cuda_has_a_version_of_its_own(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = setup_script["options"]
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setitem(options.__globals__, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setenv("MUSTDROP_CUDA_ARCHS", "90")
    assert options() == {}  # an installation from source has the plain version
    monkeypatch.setitem(options.__globals__, "PORTABLE", True)
    assert options() == {"egg_info": {"tag_build": "+cu128"}}
    monkeypatch.setenv("MUSTDROP_CUDA_ARCHS", "")
    assert options() == {}
