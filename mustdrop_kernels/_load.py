# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the operator libraries, and keeps the real reason when it cannot.

``libmustdrop`` holds the schemas and the CPU kernels and is needed for everything; ``libmustdrop_cuda`` is loaded only
where torch has CUDA, since a CPU-only torch has not the symbols that it needs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).parent / "lib"


class Library:
    """One shared library: where it is, whether it is loaded, and why not."""

    def __init__(self, name: str) -> None:
        self.path = LIBRARY_FOLDER / f"{name}.so"
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


core = Library("libmustdrop")
cuda = Library("libmustdrop_cuda")
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
    """The instruction set of the CPU kernels, such as "avx2" (`MUSTDROP_CPU_CAPABILITY`); None without the library."""
    if not core.loaded:
        return None
    query = ctypes.CDLL(str(core.path)).mustdrop_cpu_capability
    query.restype = ctypes.c_char_p
    return str(query().decode())
