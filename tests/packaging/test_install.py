# SPDX-License-Identifier: Apache-2.0
"""`pip install .` as a user does it, and the build of the CUDA library where nvcc is found."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not in a source checkout")
SOURCES = ("csrc", "python", "mustdrop_kernels", "setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "lib")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def pip_install(source: Path, target: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    env = {**os.environ, "MUSTDROP_CUDA_ARCHS": "", **environment}
    subprocess.run([*command, "--target", str(target), str(source)], check=True, env=env)


@pytest.mark.slow
def test_pip_install_gives_a_working_package(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    target = tmp_path / "site"
    pip_install(copy_sources(tmp_path / "source"), target)
    assert {p.name for p in (target / "mustdrop_kernels" / "lib").iterdir()} == {"libmustdrop.so"}
    code = f"""
import mustdrop_kernels as mk, torch
assert mk.__file__.startswith({str(target)!r}), mk.__file__
merged = torch.ops.mustdrop.spatial_merge(torch.ones(1, 5, 4), [2, 2], [2, 2])
assert merged[1].tolist() == [2]
"""
    env = {**os.environ, "PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(p)), None)


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
def test_the_same_build_compiles_the_cuda_library(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    target = tmp_path / "site"
    pip_install(copy_sources(tmp_path / "source"), target, MUSTDROP_CUDA_ARCHS="80")
    library = target / "mustdrop_kernels" / "lib" / "libmustdrop_cuda.so"
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert b"gather_tokens" in library.read_bytes()
    # A CPU-only torch says why it does not use the library; it does not break.
    code = "from mustdrop_kernels import _load; print(_load.core.loaded, _load.cuda.problem)"
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith("True")


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's functions; the call of setup() does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_asked_for_without_nvcc_is_refused(setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setitem(cuda_arguments.__globals__, "archs_of_gpus_present", lambda: "90a")
    monkeypatch.setitem(cuda_arguments.__globals__, "find_nvcc", lambda: "/opt/nvcc")
    assert cuda_arguments() == ["-DMUSTDROP_CUDA_ARCHS=90a", "-DCMAKE_CUDA_COMPILER=/opt/nvcc"]
