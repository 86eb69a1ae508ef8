# SPDX-License-Identifier: Apache-2.0
"""hub/build.toml, the project for Hugging Face's kernel-builder: it lists every source, and its flags build them.

kernel-builder requires Nix and is not run here; the test replicates its use of build.toml (a CMake file for one
extension module), and the package `kernels`, if installed, validates the file.
"""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import output_of_python

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "hub" / "hf_kernel.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="not in a source checkout")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

# For launchers without CUDA, for the backend `cupy`; a kernel of the hub has the CUDA library instead.
LEFT_OUT = {
    f"csrc/common/{name}" for name in ("driver.h", "host_names.h", "host_types.h", "launch_nvrtc.h", "nvrtc.cpp")
}
NAMESPACE = "_mustdrop_kernels_cpu_test"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runpy.run_path(str(TOOL))["project"](tmp_path_factory.mktemp("hub") / "project")


@pytest.fixture(scope="module")
def build(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "build.toml").read_text())


def sources(build: dict[str, Any], backend: str) -> list[str]:
    """Sources of a variant: the extension's files and those of the kernels for this backend."""
    kernels = [kernel for kernel in build["kernel"].values() if kernel["backend"] == backend]
    return [*build["torch"]["src"], *(path for kernel in kernels for path in kernel["src"])]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_listed_sources_exist_and_are_unique(backend: str, build: dict[str, Any], project: Path) -> None:
    listed = sources(build, backend)
    assert [path for path in listed if not (project / path).is_file()] == []
    assert len(set(listed)) == len(listed)


def test_every_source_is_listed(build: dict[str, Any], project: Path) -> None:
    files = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*") if path.is_file()}
    assert files - LEFT_OUT == {path for path in sources(build, "cuda") if path.startswith("csrc/")}
    for_gpus = {path for path in files if path.endswith((".cu", ".cuh"))} | {"csrc/common/launch.h"}
    for_gpus |= {"csrc/attention_scores/cuda.h"}
    assert files - LEFT_OUT - for_gpus == {path for path in sources(build, "cpu") if path.startswith("csrc/")}


def test_every_instruction_set_has_every_kernel(build: dict[str, Any], project: Path) -> None:
    kernels = {str(path.relative_to(project / "csrc")) for path in (project / "csrc").glob("*/cpu_kernel*.cpp")}
    made = {str(path.relative_to(project)) for path in (project / "levels").rglob("*.cpp")}
    assert made == {f"levels/{level}/{kernel}" for level in ("avx2", "avx512") for kernel in kernels}
    for backend in ("cpu", "cuda"):
        assert made == {path for path in sources(build, backend) if path.startswith("levels/")}


@pytest.mark.skipif(find_spec("kernels") is None, reason="the package kernels: make test-hf-kernel")
def test_kernels_accepts_it(project: Path) -> None:
    code = f"""
from pathlib import Path
from kernels._rust import Build
build = Build.open(Path({str(project)!r}))
assert sorted(str(backend) for backend in build.general.backends) == ["cpu", "cuda"]
"""
    output_of_python("-c", code)


# ------------------------------------------------------------------------------------------------ the build

REGISTRATION = """
#include <Python.h>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define REGISTER_EXTENSION(NAME)                                                            \\
  PyMODINIT_FUNC JOIN(PyInit_, NAME)() {                                                    \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(NAME), nullptr, 0, nullptr};   \\
    return PyModule_Create(&module);                                                        \\
  }
"""
OPS = f"""
import torch
from . import {NAMESPACE}
ops = torch.ops.{NAMESPACE}
def add_op_namespace_prefix(op_name):
    return f"{NAMESPACE}::{{op_name}}"
"""
CALL = """
import importlib.util, os, sys, torch
import mustdrop_kernels as installed
spec = importlib.util.spec_from_file_location({name!r}, {init!r})
hub = sys.modules[{name!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
assert hub._load.core.problem is None, hub._load.core.problem
assert {{hub.backends.serving(op, "cpu") for op in hub.backends.OPS}} == {{"cpu"}}
assert hub._load.core.path.name.startswith({name!r})
assert hub._load.cpu_capability() == os.environ["MUSTDROP_CPU_CAPABILITY"]
torch.manual_seed(0)
x, q, k = torch.randn(2, 577, 64), torch.randn(2, 4, 96, 64), torch.randn(2, 4, 96, 64)
types = torch.tensor([[1] * 16 + [2] * 64 + [3] * 16] * 2, dtype=torch.uint8)
for mine, theirs in (
    (hub.spatial_merge(x, [24, 24], [3, 3], 0.0), installed.spatial_merge(x, [24, 24], [3, 3], 0.0)),
    (hub.dual_attention_select(q, k, types, 0.125, 0.01, 0.01),
     installed.dual_attention_select(q, k, types, 0.125, 0.01, 0.01)),
    ([hub.cls_attention(q[:, :, 0], k, 0.125)], [installed.cls_attention(q[:, :, 0], k, 0.125)]),
):
    for mine_is, theirs_is in zip(mine, theirs):
        torch.testing.assert_close(mine_is, theirs_is)
"""


def compile_all(build: dict[str, Any], project: Path) -> Path:
    """One extension module for the CPU, every source with the flags that build.toml gives it."""
    (project / "torch-ext" / "registration.h").write_text(REGISTRATION)
    folder = Path(torch.__file__).parent
    major, minor = map(int, build["torch"]["stable-abi"].split("."))
    common = ["-std=c++20", "-fPIC", "-DNDEBUG", "-DCPU_KERNEL", f"-DTORCH_EXTENSION_NAME={NAMESPACE}"]
    common += [f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48}ull", f"-I{folder / 'include'}"]
    common += ["-DPy_LIMITED_API=0x03090000", f"-I{sysconfig.get_path('include')}"]
    objects = []
    for part in (build["torch"], *(kernel for kernel in build["kernel"].values() if kernel["backend"] == "cpu")):
        flags = [*common, *part["cxx-flags"], *(f"-I{project / path}" for path in part["include"])]
        for source in (path for path in part["src"] if path.endswith(".cpp")):
            objects.append(project / f"{source.replace('/', '_')}.o")
            subprocess.run(["g++", "-O2", *flags, "-c", project / source, "-o", objects[-1]], check=True)
    module = project / "torch-ext" / "mustdrop_kernels" / f"{NAMESPACE}.abi3.so"
    libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-Wl,--allow-shlib-undefined"]
    subprocess.run(["g++", "-shared", *objects, "-o", module, *libraries], check=True)
    (module.parent / "_ops.py").write_text(OPS)
    return module


@pytest.mark.slow
def test_it_builds_and_computes_the_same(build: dict[str, Any], project: Path) -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("Python's headers are not installed")
    package = compile_all(build, project).parent
    from mustdrop_kernels import _load

    best = _load.cpu_capability()
    levels = ("baseline", "avx2", "avx512", "avx512_bf16")
    for level in levels[: levels.index(best) + 1] if best else ():
        code = CALL.format(name=NAMESPACE, init=str(package / "__init__.py"))
        output_of_python("-c", code, MUSTDROP_CPU_CAPABILITY=level, PYTHONPATH=str(ROOT))
