# SPDX-License-Identifier: Apache-2.0
"""The backend `cuda_emulated`: the operators of the emulated library, on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from pathlib import Path

import torch

from mustdrop_kernels import backends

from . import building

NAME = "cuda_emulated"


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load the library.

    MUSTDROP_EMULATION_SANITIZER: "races" (the default), or "address" (with the sanitizer's runtime preloaded).
    MUSTDROP_EMULATION_ROOT: the source tree that holds csrc/.
    """
    root = Path(os.environ.get("MUSTDROP_EMULATION_ROOT") or building.ROOT)
    path = building.build_library(os.environ.get("MUSTDROP_EMULATION_SANITIZER", "races"), root)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def configure(seed: int, capability: int = 90, multiprocessors: int = 4) -> None:
    """Set the order in which threads run, and the emulated device.

    Args:
        seed: of the order of threads.
        capability: compute capability times ten. 80 has no clusters; 120 has little shared memory.
        multiprocessors: of the device.
    """
    library().cuda_emulation_configure(ctypes.c_uint(seed), ctypes.c_int(capability), ctypes.c_int(multiprocessors))


def configure_for(test: str) -> None:
    """Set an order of threads and a device for a test, the same in each run.

    MUSTDROP_EMULATION_SEED changes the orders of all tests; MUSTDROP_EMULATION_CAPABILITY sets the device.
    """
    drawn = zlib.crc32(test.encode()) + int(os.environ.get("MUSTDROP_EMULATION_SEED", "0")) * 7919
    capability = os.environ.get("MUSTDROP_EMULATION_CAPABILITY") or ("80", "90", "120")[drawn % 3]
    configure(drawn % 2**32, int(capability))


def _implementation(op: str) -> backends.Implementation:
    library()
    return getattr(torch.ops.mustdrop_emulated, op)


@functools.cache
def _served() -> str:
    return "".join(path.read_text() for path in building.launchers())


def why_not(op: str, device_type: str) -> str | None:
    """Why the emulation does not serve an operator, None where it does."""
    if device_type != "cpu":
        return "it emulates a GPU on CPU tensors"
    if reason := building.why_not():
        return reason
    return None if f'm.impl("{op}"' in _served() else "there is no CUDA launcher for it"


def emulated() -> backends.Backend:
    """The backend, unregistered."""
    return backends.Backend(NAME, _implementation, why_not, "CUDA kernels emulated on the host")
