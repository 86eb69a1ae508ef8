# SPDX-License-Identifier: Apache-2.0
"""Launchers of ``libmustdrop_nvrtc``: C++ that checks, allocates and plans, and obtains kernels from this module.

Launches go from C++ straight to the driver; Python is called once per kernel and device.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from typing import Protocol

from ... import _load

FACTS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
MAKE_CURRENT = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)


class Hooks(ctypes.Structure):
    """``LaunchHooks`` of csrc/common/launch_nvrtc.h."""

    _fields_ = (
        ("facts", FACTS),
        ("find", FIND),
        ("make_current", MAKE_CURRENT),
        ("current_stream", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
        ("count_clusters", ctypes.c_void_p),
    )


class Machine(Protocol):
    """Compiles and launches kernels. Devices are given by index."""

    current_stream: int  # address of a function int(int device, void** stream)
    launch: int  # address of a function like cuLaunchKernelEx
    count_clusters: int  # address of a function like cuOccupancyMaxActiveClusters

    def facts(self, device: int) -> tuple[int, int, int]:
        """Compute capability times ten, number of multiprocessors, maximum shared memory of a block in bytes."""

    def find(self, device: int, kernel: str) -> int:
        """The kernel of this name ("score_kernel<float, 1>") as the function that ``launch`` takes."""

    def make_current(self, device: int) -> None:
        """Make the device's primary context current in this thread."""


def expression(signature: str) -> str:
    """A kernel's C++ name, extracted from the signature string that the compiler of the launchers produces.

    >>> expression("const char* mustdrop::kernel_signature() [with auto kKernel = mustdrop::cls_kernel<half_t, 8>]")
    'mustdrop::cls_kernel<half_t, 8>'
    """
    found = re.search(r"kKernel = &?(.*)\]$", signature)
    if found is None:
        raise ValueError(f"not the signature of a kernel: {signature}")
    return found[1]


def kernels(library: ctypes.CDLL) -> list[str]:
    """Names of all kernels that the launchers may request."""
    name = library.mustdrop_nvrtc_kernel
    name.restype = ctypes.c_char_p
    names: list[str] = []
    while text := name(len(names)):
        names.append(expression(text.decode()))
    return sorted(names)


_error = threading.local()  # keeps the message alive until C++ has copied it


def _reporting(function: Callable[..., None]) -> Callable[..., int | None]:
    """A callback for C++ that returns null, or the address of an error message."""

    def call(*args: object) -> int | None:
        try:
            function(*args)
        except Exception as error:
            _error.text = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(_error.text)
        return None

    return call


def connect(library: ctypes.CDLL, machine: Machine) -> Hooks:
    """Connect the launchers of a library to a machine. The result must outlive their use."""

    def facts(device: int, out: ctypes.Array[ctypes.c_int]) -> None:
        out[0], out[1], out[2] = machine.facts(device)

    def find(device: int, signature: bytes, out: ctypes.Array[ctypes.c_void_p]) -> None:
        out[0] = machine.find(device, expression(signature.decode()))

    hooks = Hooks(
        FACTS(_reporting(facts)),
        FIND(_reporting(find)),
        MAKE_CURRENT(_reporting(machine.make_current)),
        machine.current_stream,
        machine.launch,
        machine.count_clusters,
    )
    library.mustdrop_nvrtc_connect(ctypes.byref(hooks))
    return hooks


_connected: Hooks | None = None
_connecting = threading.Lock()


def connect_once(make_machine: Callable[[], Machine]) -> None:
    """Load the launchers, whose operators are ``torch.ops.mustdrop_nvrtc.*``, and connect them to a machine.

    Raises:
        RuntimeError: the library could not be loaded; the message gives the reason.
    """
    global _connected
    with _connecting:
        if _connected is not None:
            return
        machine = make_machine()
        if not _load.nvrtc.loaded:
            _load.nvrtc.load()
        if _load.nvrtc.problem is not None:
            raise RuntimeError(_load.nvrtc.problem)
        _connected = connect(ctypes.CDLL(str(_load.nvrtc.path)), machine)
