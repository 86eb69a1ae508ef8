# SPDX-License-Identifier: Apache-2.0
"""Loading of the operator libraries; a failure keeps the loader's reason.

``libmustdrop`` holds the schemas and the CPU kernels and is always required; ``libmustdrop_cuda`` is loaded only if
torch has CUDA, since a CPU-only torch lacks the symbols that it requires.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

from ._namespace import NAMESPACE

LIBRARY_FOLDER = Path(__file__).parent / "lib"
# Hugging Face's kernel-builder builds one library for all operators, beside the Python files.
ALL_IN_ONE = next(Path(__file__).parent.glob(f"{NAMESPACE}*.so"), None)


class Library:
    """A shared library: its path, and the reason if it is not loaded."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.path = path or LIBRARY_FOLDER / f"{name}.so"
        self.problem: str | None = f"{name} has not been loaded"

    @property
    def loaded(self) -> bool:
        """True if the library's operators are registered in this process."""
        return self.problem is None

    def load(self) -> None:
        """Load the library; on failure ``problem`` holds the loader's error."""
        if not self.path.is_file():
            self.problem = f"{self.path.name} was not built (not found in {self.path.parent})"
            return
        try:
            _refuse_cut_off(self.path)
            torch.ops.load_library(self.path)
        except (OSError, RuntimeError) as error:
            self.problem = f"{self.path.name} could not be loaded: {error.__cause__ or error}"
        else:
            self.problem = None


def _refuse_cut_off(path: Path) -> None:
    """Raise OSError for a truncated library, as an interrupted copy leaves it: loading one crashes the process."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return  # the loader reports the error
        segments, sections = struct.unpack_from("<QQ", header, 32)
        segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from("<4H", header, 54)
        file.seek(segments)
        table = file.read(segment_bytes * segment_count)
    ends = [segments + segment_bytes * segment_count, sections + section_bytes * section_count]
    for at in range(0, len(table) - 39, segment_bytes):
        offset, size = (struct.unpack_from("<Q", table, at + field)[0] for field in (8, 32))
        ends.append(offset + size)
    if (there := path.stat().st_size) < max(ends):
        raise OSError(f"{path} is cut off: it has {there} of {max(ends)} bytes")


core = Library("libmustdrop", ALL_IN_ONE)
cuda = Library("libmustdrop_cuda", ALL_IN_ONE)
nvrtc = Library("libmustdrop_nvrtc")  # loaded by the backend `cupy` on its first call


def load_all() -> None:
    """Load the libraries that this torch can use. Touches no device."""
    core.load()
    if not core.loaded:
        cuda.problem = core.problem
    elif torch.version.cuda is None:
        cuda.problem = "this torch is built without CUDA"
    else:
        cuda.load()


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels, such as "avx2" (`MUSTDROP_CPU_CAPABILITY`); None without the library."""
    if not core.loaded:
        return None
    query = ctypes.CDLL(str(core.path)).mustdrop_cpu_capability
    query.restype = ctypes.c_char_p
    return str(query().decode())
