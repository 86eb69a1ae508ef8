# SPDX-License-Identifier: Apache-2.0
"""Lays the package out as a kernel of the Hugging Face hub: what `kernels.get_local_kernel(FOLDER)` loads.

    python tools/hf_kernel.py build/hf                              # FOLDER/build/torch-stable-abi210-cpu-x86_64-linux
    MUSTDROP_CUDA_ARCHS="80;90a" python tools/hf_kernel.py build/hf     # the same for this nvcc's CUDA

One folder for every torch from 2.10 on. Its operators are in a namespace that holds a digest of the sources, so that
several versions and an installed mustdrop_kernels live in one process. The libraries are built in build/hf-kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import setuptools

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "hf-kernel"
PACKAGE = ROOT / "mustdrop_kernels"
NAME = "mustdrop-kernels"


def setup_script() -> dict[str, Any]:
    """setup.py's functions, which find nvcc, CMake and torch; the call of setup() does nothing."""
    import runpy

    with mock.patch.object(setuptools, "setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def digest() -> str:
    """Of everything that a copy is made of."""
    files = sorted(path for folder in ("csrc", "mustdrop_kernels") for path in (ROOT / folder).rglob("*.[chp]*"))
    sources = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:7]


def backend(nvcc: str | None) -> tuple[str, str]:
    """The kind of device, and what the folder's name calls it: ("cuda", "cu130")."""
    if not os.environ.get("MUSTDROP_CUDA_ARCHS"):
        return "cpu", "cpu"
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
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


def export(folder: Path) -> Path:
    """Build, and lay out below `folder`; returns the variant's folder."""
    script = setup_script()
    os.environ.setdefault("MUSTDROP_CUDA_ARCHS", "")
    kind, called = backend(script["find_nvcc"]())
    namespace = f"_mustdrop_kernels_{kind}_{digest()}"
    libraries = build(namespace, script)
    variant = folder / "build" / f"torch-stable-abi210-{called}-{platform.machine()}-{platform.system().lower()}"
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__", "cli", "bench"))
    named = variant / "_namespace.py"
    named.write_text(named.read_text().replace('NAMESPACE = "mustdrop"', f'NAMESPACE = "{namespace}"'))
    (variant / "lib").mkdir()
    for library in libraries:
        shutil.copy2(library, variant / "lib")
    metadata = {
        "id": namespace,
        "name": NAME,
        "version": 1,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": kind},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(export(Path(sys.argv[1])))
