# SPDX-License-Identifier: Apache-2.0
"""The backend `cupy_emulated`: the launchers of the backend `cupy`, on emulated kernels."""

from __future__ import annotations

import ctypes
import functools

import torch

from mustdrop_kernels import backends
from mustdrop_kernels.backends.cupy import launchers

from . import backend, building

NAME = "cupy_emulated"


def _short(name: str) -> str:
    """A kernel's name without its namespace, which compilers qualify differently."""
    return name.replace("mustdrop::", "")


class Emulation:
    """See ``launchers.Machine``."""

    def __init__(self) -> None:
        self.library = backend.library()
        self.current_stream = self._address("cuda_emulation_current_stream")
        self.launch = self._address("cuda_emulation_launch")
        self.count_clusters = self._address("cuda_emulation_count_clusters")
        kernel, signature = self.library.cuda_emulation_kernel, self.library.cuda_emulation_signature
        kernel.restype, signature.argtypes, signature.restype = ctypes.c_void_p, [ctypes.c_void_p], ctypes.c_char_p
        self.kernels: dict[str, int] = {}
        while found := kernel(len(self.kernels)):
            self.kernels[_short(launchers.expression(signature(found).decode()))] = found
        self.found: list[str] = []

    def _address(self, function: str) -> int:
        return ctypes.cast(getattr(self.library, function), ctypes.c_void_p).value or 0

    def facts(self, device: int) -> tuple[int, int, int]:
        out = (ctypes.c_int * 3)()
        self.library.cuda_emulation_facts(out)
        return out[0], out[1], out[2]

    def find(self, device: int, kernel: str) -> int:
        self.found.append(kernel)
        function = self.kernels[_short(kernel)]
        self.library.cuda_emulation_set_shared_limit(ctypes.c_void_p(function), self.facts(device)[2])
        return function

    def make_current(self, device: int) -> None:
        raise AssertionError("every thread has a context here")


@functools.cache
def connected() -> tuple[ctypes.CDLL, Emulation, launchers.Hooks]:
    """The launchers, the emulation of their kernels, and the hooks between the two."""
    path = building.build_launchers()
    torch.ops.load_library(path)
    library, machine = ctypes.CDLL(str(path)), Emulation()
    return library, machine, launchers.connect(library, machine)


def _implementation(op: str) -> backends.Implementation:
    connected()
    return getattr(torch.ops.mustdrop_nvrtc_emulated, op)


def emulated() -> backends.Backend:
    """The backend, unregistered."""
    return backends.Backend(NAME, _implementation, backend.why_not, "the launchers of cupy, emulated on the host")
