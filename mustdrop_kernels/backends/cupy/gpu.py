# SPDX-License-Identifier: Apache-2.0
"""A real GPU behind the launchers: CuPy compiles and loads kernels, the driver launches them on torch's streams."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from cupy.cuda import driver, runtime

from . import compile

OLDEST = 80  # compute capability times ten

# Of cuda.h.
_STATIC_SHARED_BYTES = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_MOST_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def _address(library: str, function: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(library), function), ctypes.c_void_p).value or 0


def _most_shared_bytes(device: int) -> int:
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device))


class Gpu:
    """See ``launchers.Machine``."""

    def __init__(self) -> None:
        libtorch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
        self.current_stream = _address(str(libtorch_cuda), "aoti_torch_get_current_cuda_stream")
        self.launch = _address("libcuda.so.1", "cuLaunchKernelEx")

    def facts(self, device: int) -> tuple[int, int, int]:
        """What the launchers plan with; the capability is that of the code that will run."""
        multiprocessors = runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device)
        return self._architecture(device)[1], multiprocessors, _most_shared_bytes(device)

    def find(self, device: int, kernel: str) -> int:
        """Compile, load, and allow as much shared memory as the device has."""
        code = compile.compiled(kernel, self._architecture(device)[0])
        self.make_current(device)
        function = driver.moduleGetFunction(driver.moduleLoadData(code.image), code.name)
        most = _most_shared_bytes(device) - driver.funcGetAttribute(_STATIC_SHARED_BYTES, function)
        driver.funcSetAttribute(function, _MOST_DYNAMIC_SHARED_BYTES, most)
        return int(function)

    def make_current(self, device: int) -> None:
        """The context that torch uses too."""
        runtime.setDevice(device)

    @staticmethod
    def _architecture(device: int) -> tuple[str, int]:
        major, minor = torch.cuda.get_device_capability(device)
        if major * 10 + minor < OLDEST:
            raise RuntimeError(f"a device of compute capability {major}.{minor}; the kernels need 8.0 or newer")
        return compile.architecture(major * 10 + minor)
