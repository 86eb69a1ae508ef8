# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the operator libraries, and keeps the real reason when it cannot.

``libmustdrop`` holds the schemas and the CPU kernels and is needed for everything; ``libmustdrop_cuda`` is loaded only
where torch has CUDA, since a CPU-only torch has not the symbols that it needs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ._namespace import NAMESPACE

LIBRARY_FOLDER = Path(__file__).parent / "lib"
# kernel-builder of Hugging Face builds one library for all operators, beside the Python files.
ALL_IN_ONE = next(Path(__file__).parent.glob(f"{NAMESPACE}*.so"), None)


class Library:
    """One shared library: where it is, whether it is loaded, and why not."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.path = path or LIBRARY_FOLDER / f"{name}.so"
        self.problem: str | None = f"{name} has not been loaded"

    @property
    def loaded(self) -> bool:
        """Whether the library's operators are registered in this process."""
        return self.problem is None

    def load(self) -> None:
        """Load the library; on failure ``problem`` says what the loader said."""
        if not self.path.is_file():
            self.problem = f"{self.path.name} was not built (not found in {self.path.parent})"
            return
        try:
            torch.ops.load_library(self.path)
        except (OSError, RuntimeError) as error:
            self.problem = f"{self.path.name} could not be loaded: {error.__cause__ or error}"
        else:
            self.problem = None


core = Library("libmustdrop", ALL_IN_ONE)
cuda = Library("libmustdrop_cuda", ALL_IN_ONE)
nvrtc = Library("libmustdrop_nvrtc")  # loaded by the backend `cupy` when it is first called


def load_all() -> None:
    """Load what this torch can use. Touches no device."""
    core.load()
    if not core.loaded:
        cuda.problem = core.problem
    elif torch.version.cuda is None:
        cuda.problem = "this torch is built without CUDA"
    else:
        cuda.load()


def cpu_capability() -> str | None:
    """The instruction set of the CPU kernels: "baseline", "avx2", "avx512", "avx512_bf16"; None without the library."""
    if not core.loaded:
        return None
    query = ctypes.CDLL(str(core.path)).mustdrop_cpu_capability
    query.restype = ctypes.c_char_p
    return str(query().decode())
