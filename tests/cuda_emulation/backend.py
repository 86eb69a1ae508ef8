# SPDX-License-Identifier: Apache-2.0
"""The backend `cuda_emulated`: the operators of the emulated library, on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from mustdrop_kernels import backends

from . import build as building

NAME = "cuda_emulated"


@functools.cache
def library() -> ctypes.CDLL:
    """Build and load the library.

    MUSTDROP_EMULATION_SANITIZER: "undefined" (the default), or "address" (the process must have been started with the
    sanitizer's runtime preloaded). MUSTDROP_EMULATION_SEED and MUSTDROP_EMULATION_CAPABILITY: see ``configure``.
    """
    path = building.build(os.environ.get("MUSTDROP_EMULATION_SANITIZER", "undefined"))
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    seed = int(os.environ.get("MUSTDROP_EMULATION_SEED", "0"))
    loaded.cuda_emulation_configure(seed, int(os.environ.get("MUSTDROP_EMULATION_CAPABILITY", "90")))
    return loaded


def configure(seed: int, capability: int = 90) -> None:
    """Choose the order in which threads run, and the device that is played (80: no clusters)."""
    library().cuda_emulation_configure(seed, capability)


def _implementation(op: str) -> backends.Implementation:
    library()
    return getattr(torch.ops.mustdrop_emulated, op)


def _why_not(op: str, device_type: str) -> str | None:
    if device_type != "cpu":
        return "it plays a GPU on CPU tensors"
    if reason := building.why_not():
        return reason
    served = any(f'm.impl("{op}"' in p.read_text() for p in (building.ROOT / "csrc").glob("*/cuda.cu"))
    return None if served else "there is no CUDA launcher for it"


def register() -> None:
    """Make the backend known to mustdrop_kernels, once."""
    if NAME not in backends.registered():
        backends.register_backend(
            backends.Backend(NAME, _implementation, _why_not, "CUDA kernels emulated on the host")
        )
