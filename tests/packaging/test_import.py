# SPDX-License-Identifier: Apache-2.0
"""Import of the package: no side effects, and clear errors for missing or broken libraries."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import python_path, run_python

import mustdrop_kernels

PACKAGE = Path(mustdrop_kernels.__file__).parent


def run(code: str, folder: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", code, folder=folder, PYTHONPATH=python_path(folder), **environment)


NO_SIDE_EFFECTS = """
import os, sys
before = dict(os.environ)
import torch
loaded = set(sys.modules)
import mustdrop_kernels
assert dict(os.environ) == before
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert not new & {"triton", "cupy", "transformers", "rich", "typer", "matplotlib", "numpy"}, new
assert not torch.cuda.is_initialized()
"""
PLUG_IN = """
import sys
import mustdrop_kernels
loaded = set(sys.modules)
from mustdrop_kernels.integrations.vllm import register
new = set(sys.modules) - loaded
assert new <= {"mustdrop_kernels.integrations", "mustdrop_kernels.integrations.vllm",
               "mustdrop_kernels.integrations.vllm.plugin"}, new
"""
WITHOUT_NATIVE = """
import sys
sys.modules["mustdrop_kernels._native"] = None
import torch, mustdrop_kernels as mk
from mustdrop_kernels.ops.samples import sample
for op in mk.backends.OPS:
    getattr(mk, op)(**sample(op))
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(NO_SIDE_EFFECTS, id="no side effects"),
        pytest.param(PLUG_IN, id="the vLLM plug-in imports nothing without vLLM"),
        pytest.param(WITHOUT_NATIVE, id="without the native module"),
    ],
)
def test_import(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


def copy_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "mustdrop_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "mustdrop_kernels"


CALL = """
import torch, mustdrop_kernels as mk
assert mk.__file__.startswith({folder!r}), mk.__file__
from mustdrop_kernels.ops.samples import sample
assert mk.select_topk(**sample("select_topk"), backend="reference").counts.shape == (2,)
mk.select_topk(**sample("select_topk"))
"""


def test_missing_library_is_named(tmp_path: Path) -> None:
    shutil.rmtree(copy_package(tmp_path) / "lib")
    done = run(CALL.format(folder=str(tmp_path)), folder=tmp_path)
    assert done.returncode == 1
    assert "libmustdrop.so was not built" in done.stderr


def test_broken_library_gives_the_loader_error(tmp_path: Path) -> None:
    (copy_package(tmp_path) / "lib" / "libmustdrop.so").write_bytes(b"not a library")
    done = run(CALL.format(folder=str(tmp_path)), folder=tmp_path)
    assert done.returncode == 1
    assert "libmustdrop.so could not be loaded" in done.stderr
    assert "file too short" in done.stderr or "invalid ELF header" in done.stderr


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99], ids="the first {:.0%}".format)
def test_a_truncated_library_is_not_loaded(share: float, tmp_path: Path) -> None:
    """The loader would map pages past the end of the file, and the process would crash with a bus error."""
    library = copy_package(tmp_path) / "lib" / "libmustdrop.so"
    whole = library.read_bytes()
    library.write_bytes(whole[: int(share * len(whole))])
    done = run(CALL.format(folder=str(tmp_path)), folder=tmp_path)
    assert done.returncode == 1
    assert f"is cut off: it has {library.stat().st_size} of {len(whole)} bytes" in done.stderr


# ------------------------------------------------------------------------------------------------ the CUDA library

WITH_CUDA = """
import torch
torch.version.cuda = "13.0"
import mustdrop_kernels as mk
from mustdrop_kernels import _load, backends
assert _load.core.loaded
print(backends.registered()["cuda"].why_not(backends.OPS[0], "cuda"))
"""
UNDEFINED = 'extern "C" int aoti_torch_no_such(); static int x = aoti_torch_no_such();'


def compiled(source: str, library: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    subprocess.run(["g++", "-x", "c++", "-shared", "-fPIC", "-", "-o", library], input=source, text=True, check=True)


def cut(library: Path) -> None:
    content = (library.parent / "libmustdrop.so").read_bytes()
    library.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda library: None, "libmustdrop_cuda.so was not built (not found in ", id="missing"),
        pytest.param(cut, "libmustdrop_cuda.so is cut off: it has ", id="cut off"),
        pytest.param(Path.touch, "libmustdrop_cuda.so could not be loaded: ", id="empty"),
        pytest.param(lambda library: compiled(UNDEFINED, library), "undefined symbol: aoti_torch_no_such", id="symbol"),
        pytest.param(lambda library: compiled("", library), "was built without a kernel for it", id="no kernels"),
    ],
)
def test_a_broken_cuda_library_gives_the_real_reason(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    """The CPU library still works, as on a torch with CUDA."""
    library = copy_package(tmp_path) / "lib" / "libmustdrop_cuda.so"
    library.unlink(missing_ok=True)
    make(library)
    done = run(WITH_CUDA, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout


def test_cpu_capability_is_applied_or_raises() -> None:
    code = "from mustdrop_kernels import _load; print(_load.cpu_capability())"
    assert run(code, MUSTDROP_CPU_CAPABILITY="baseline").stdout.strip() == "baseline"
    refused = run(code, MUSTDROP_CPU_CAPABILITY="sse9").stdout
    assert "must be baseline, avx2, avx512, avx512_bf16 or amx_bf16" in refused
