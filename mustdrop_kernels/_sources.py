# SPDX-License-Identifier: Apache-2.0
"""Build of the libraries: the CUDA compiler, the GPUs' targets, and the record of sources and targets beside them.

Imports nothing of the package: setup.py, tools/gpu_bundle.py and tools/cuda_static run this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

RECORD = "build.json"  # in mustdrop_kernels/lib
LIBRARIES = ("libmustdrop.so", "libmustdrop_nvrtc.so", "libmustdrop_cuda.so")  # the last where there are CUDA targets


def find_nvcc(*further: str) -> str | None:
    """Path of the CUDA compiler of the environment, the PATH, the usual folder, or one of these paths."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("MUSTDROP_NVCC"),
        os.environ.get("CUDACXX"),
        str(Path(home) / "bin" / "nvcc") if home else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        *further,
    ]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def targets_of_gpus() -> list[str]:
    """CUDA targets of the GPUs that nvidia-smi lists, such as "90"; empty without a GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({text.replace(".", "") for text in found})


def digest(root: Path) -> str | None:
    """SHA-256 of csrc/, python/, CMakeLists.txt and setup.py of a source tree; None without them."""
    paths = [root / "CMakeLists.txt", root / "setup.py", *(root / "csrc").rglob("*"), *(root / "python").rglob("*.cpp")]
    files = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    if not (root / "csrc").is_dir():
        return None
    hashed = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        hashed.update(f"{name}\0{len(content)}\0".encode() + content)
    return hashed.hexdigest()


def record(folder: Path) -> dict[str, Any] | None:
    """Build record of the libraries in a folder; None if there is none or it is malformed."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_record(folder: Path, root: Path, cuda_archs: list[str], cmake_args: str) -> None:
    """Record that the libraries of a folder were built from the sources below ``root``."""
    made_of = {"sources": digest(root), "cuda_archs": cuda_archs, "cmake_args": cmake_args}
    (folder / RECORD).write_text(json.dumps(made_of, indent=1) + "\n")


def made_of_these(folder: Path, root: Path, cuda_archs: list[str], cmake_args: str = "") -> bool:
    """True if the libraries of a folder were built from the sources below ``root`` with these options."""
    made_of = record(folder)
    if made_of is None or made_of.get("sources") != digest(root) or made_of.get("cmake_args") != cmake_args:
        return False
    if not set(cuda_archs) <= set(made_of["cuda_archs"]):
        return False
    return all((folder / name).is_file() for name in LIBRARIES[: 3 if made_of["cuda_archs"] else 2])
