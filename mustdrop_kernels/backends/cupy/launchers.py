# SPDX-License-Identifier: Apache-2.0
"""The launchers of ``libmustdrop_nvrtc``: C++ that checks, allocates and plans, and asks this module for kernels.

A launch goes from C++ straight to the driver; Python is called once for each kernel and device.
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
    )


class Machine(Protocol):
    """Who compiles and launches. Devices are given by index."""

    current_stream: int  # address of a function int(int device, void** stream)
    launch: int  # address of a function like cuLaunchKernelEx

    def facts(self, device: int) -> tuple[int, int, int]:
        """Compute capability times ten, multiprocessors, bytes of shared memory that a block may ask for."""

    def find(self, device: int, kernel: str) -> int:
        """The kernel of this name ("score_kernel<float, 1>") as the function that ``launch`` takes."""

    def make_current(self, device: int) -> None:
        """Let this thread use the device's primary context."""


def expression(signature: str) -> str:
    """A kernel's name as C++ writes it, from what the compiler of the launchers says about it.

    >>> expression("const char* mustdrop::kernel_signature() [with auto kKernel = mustdrop::cls_kernel<half_t, 8>]")
    'mustdrop::cls_kernel<half_t, 8>'
    """
    found = re.search(r"kKernel = &?(.*)\]$", signature)
    if found is None:
        raise ValueError(f"not the signature of a kernel: {signature}")
    return found[1]


def kernels(library: ctypes.CDLL) -> list[str]:
    """The names of all kernels that the launchers may ask for."""
    name = library.mustdrop_nvrtc_kernel
    name.restype = ctypes.c_char_p
    names: list[str] = []
    while text := name(len(names)):
        names.append(expression(text.decode()))
    return sorted(names)


_said = threading.local()  # keeps a problem's text alive until C++ has copied it


def _telling(function: Callable[..., None]) -> Callable[..., int | None]:
    """A callback for C++: null, or the address of what went wrong."""

    def call(*args: object) -> int | None:
        try:
            function(*args)
        except Exception as error:
            _said.text = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(_said.text)
        return None

    return call


def connect(library: ctypes.CDLL, machine: Machine) -> Hooks:
    """Let a machine serve the launchers of a library. The result has to live as long as they are called."""

    def facts(device: int, out: ctypes.Array[ctypes.c_int]) -> None:
        out[0], out[1], out[2] = machine.facts(device)

    def find(device: int, signature: bytes, out: ctypes.Array[ctypes.c_void_p]) -> None:
        out[0] = machine.find(device, expression(signature.decode()))

    hooks = Hooks(
        FACTS(_telling(facts)),
        FIND(_telling(find)),
        MAKE_CURRENT(_telling(machine.make_current)),
        machine.current_stream,
        machine.launch,
    )
    library.mustdrop_nvrtc_connect(ctypes.byref(hooks))
    return hooks


_connected: Hooks | None = None
_connecting = threading.Lock()


def connect_once(make_machine: Callable[[], Machine]) -> None:
    """Load the launchers, whose operators are ``torch.ops.mustdrop_nvrtc.*``, and let a machine serve them.

    Raises:
        RuntimeError: the library could not be loaded; the message says why.
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
