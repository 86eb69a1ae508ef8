# SPDX-License-Identifier: Apache-2.0
"""Lay the package out for the Hugging Face hub: a built kernel, or a project for kernel-builder.

    python hub/hf_kernel.py build/hf                              # FOLDER/build/torch-stable-abi210-cpu-x86_64-linux
    MUSTDROP_CUDA_ARCHS="80;90" python hub/hf_kernel.py build/hf     # the same for this nvcc's CUDA
    python hub/hf_kernel.py --project build/hf-project            # build.toml, its sources and the Python package

The first two are what `kernels.get_local_kernel(FOLDER)` loads: one folder for every torch from 2.10 on. Its operators
are in a namespace that holds a digest of the sources, so that several versions and an installed mustdrop_kernels live
in one process. The libraries are built in build/hf-kernel.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import setuptools

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "hf-kernel"
PACKAGE = ROOT / "mustdrop_kernels"
NAME = "mustdrop-kernels"
PYTHON_NAME = NAME.replace("-", "_")
LEFT_OUT = shutil.ignore_patterns("lib", "*.so", "__pycache__", "cli", "bench", "evaluation")

# Older versions of the package kernels look for the kernel in a folder of its name.
OLDER = """\
import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: value for name, value in vars(sys.modules["{id}"]).items() if not name.startswith("__")}})
"""

# kernel-builder sets flags per file, equal on all machines: one file per CPU kernel and instruction set.
LEVEL = """\
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#pragma GCC target("{target}")
#include "{kernel}"
#endif
"""
TARGETS = {
    "avx2": "avx2,fma,f16c,bmi2",
    "avx512": "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512",
}


def setup_script() -> dict[str, Any]:
    """setup.py's functions, which find nvcc, CMake and torch; the call of setup() does nothing."""
    with mock.patch.object(setuptools, "setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def sources_digest() -> str:
    """Digest of all files of a copy."""
    files = sorted(path for folder in ("csrc", "mustdrop_kernels") for path in (ROOT / folder).rglob("*.[chp]*"))
    sources = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:7]


def backend(nvcc: str | None) -> tuple[str, str]:
    """The kind of device, and its form in the folder's name: ("cuda", "cu130")."""
    if not os.environ.get("MUSTDROP_CUDA_ARCHS"):
        return "cpu", "cpu"
    output = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", output)
    if release is None:
        raise SystemExit(f"{nvcc} does not say its version")
    return "cuda", f"cu{release[1]}{release[2]}"


def build(namespace: str, script: dict[str, Any]) -> list[Path]:
    """The libraries with their operators in this namespace."""
    arguments = [f"-DMUSTDROP_TORCH={script['torch_folder']()}", f"-DMUSTDROP_NAMESPACE={namespace}"]
    arguments += ["-DMUSTDROP_NATIVE=OFF", "-DMUSTDROP_CUDA_ARCHS=", *script["cuda_arguments"]()]
    cmake = script["CMakeBuild"].cmake()
    subprocess.run([cmake, "-S", ROOT, "-B", BUILD, *arguments], check=True)
    with_cuda = any(argument.startswith("-DMUSTDROP_CUDA_ARCHS=") and argument[-1] != "=" for argument in arguments)
    names = ["mustdrop", "mustdrop_cuda"] if with_cuda else ["mustdrop"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", BUILD, "--parallel", jobs, "--target", *names], check=True)
    return [BUILD / f"lib{name}.so" for name in names]


def copy_package(target: Path, namespace: str) -> None:
    """Copy the package's Python files; `namespace` is the line of Python that sets the operators' namespace."""
    shutil.copytree(PACKAGE, target, ignore=LEFT_OUT)
    named = target / "_namespace.py"
    named.write_text(named.read_text().replace('NAMESPACE = "mustdrop"', namespace))


def files_digest(variant: Path) -> dict[str, Any]:
    """Digests of every file of a variant, in the form of the hub."""
    files = {path.relative_to(variant).as_posix(): path for path in sorted(variant.rglob("*")) if path.is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    return {
        "algorithm": "sha256",
        "files": {name: base64.b64encode(hashed).decode() for name, hashed in hashes.items()},
    }


def architectures() -> list[str]:
    """MUSTDROP_CUDA_ARCHS as the hub writes it: "80;90" is 8.0 and 9.0."""
    return [re.sub(r"(\d)(\D?)$", r".\1\2", target) for target in os.environ["MUSTDROP_CUDA_ARCHS"].split(";")]


def export(folder: Path) -> Path:
    """Build, and lay out below `folder`; returns the variant's folder."""
    script = setup_script()
    os.environ.setdefault("MUSTDROP_CUDA_ARCHS", "")
    kind, called = backend(script["find_nvcc"]())
    namespace = f"_{PYTHON_NAME}_{kind}_{sources_digest()}"
    libraries = build(namespace, script)
    variant = folder / "build" / f"torch-stable-abi210-{called}-{platform.machine()}-{platform.system().lower()}"
    shutil.rmtree(variant, ignore_errors=True)
    copy_package(variant, f'NAMESPACE = "{namespace}"')
    (variant / "lib").mkdir()
    for library in libraries:
        shutil.copy2(library, variant / "lib")
    (variant / PYTHON_NAME).mkdir()
    (variant / PYTHON_NAME / "__init__.py").write_text(OLDER.format(id=namespace))
    metadata = {
        "id": namespace,
        "name": NAME,
        "version": 1,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": kind, **({"archs": architectures()} if kind == "cuda" else {})},
        "digest": files_digest(variant),
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def listed(folder: Path, patterns: str) -> str:
    """The lines of a list of sources, its patterns replaced by the files of the project that match."""
    found: dict[str, None] = {}
    for pattern in re.findall(r'"(.+)"', patterns):
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern.removeprefix("!")))
        if pattern.startswith("!"):
            found = {path: None for path in found if path not in paths}
        else:
            found |= dict.fromkeys(paths)
    return "".join(f'  "{path}",\n' for path in found)


def project(folder: Path) -> Path:
    """Lay out a project for kernel-builder, which generates CMakeLists.txt and `_ops.py`; returns its folder."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already")
    shutil.copytree(ROOT / "hub", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy2(ROOT / "LICENSE", folder)
    for kernel in sorted(path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").glob("*/cpu_kernel*.cpp")):
        for level, target in TARGETS.items():
            path = folder / "levels" / level / kernel
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(LEVEL.format(target=target, kernel=kernel.as_posix()))
    build = folder / "build.toml"
    lists = re.compile(r"^src = \[\n(.*?)^\]", re.MULTILINE | re.DOTALL)
    build.write_text(lists.sub(lambda found: f"src = [\n{listed(folder, found[1])}]", build.read_text()))
    ops = "from . import _ops  # of kernel-builder\n\n"
    copy_package(
        folder / "torch-ext" / PYTHON_NAME, ops + 'NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")'
    )
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--project", action="store_true", help="build nothing: lay out the project for kernel-builder")
    arguments = parser.parse_args()
    print((project if arguments.project else export)(arguments.folder))
