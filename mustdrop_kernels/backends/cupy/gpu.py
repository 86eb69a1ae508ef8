# SPDX-License-Identifier: Apache-2.0
"""Kernel compilation and launch on a real GPU: CuPy compiles and loads, the driver launches on torch's streams."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from cupy.cuda import driver, runtime

from . import compile

OLDEST = 80  # compute capability times ten

# Constants of cuda.h.
_STATIC_SHARED_BYTES = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_MOST_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def _address(library: str, function: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(library), function), ctypes.c_void_p).value or 0


def _most_shared_bytes(device: int) -> int:
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device))


class Gpu:
    """Implementation of ``launchers.Machine`` for CUDA devices."""

    def __init__(self) -> None:
        libtorch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
        self.current_stream = _address(str(libtorch_cuda), "aoti_torch_get_current_cuda_stream")
        self.launch = _address("libcuda.so.1", "cuLaunchKernelEx")
        self.count_clusters = _address("libcuda.so.1", "cuOccupancyMaxActiveClusters")

    def facts(self, device: int) -> tuple[int, int, int]:
        """Device properties for planning; the capability is that of the compiled code."""
        multiprocessors = runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device)
        return self._architecture(device)[1], multiprocessors, _most_shared_bytes(device)

    def find(self, device: int, kernel: str) -> int:
        """Compile and load a kernel, and raise its dynamic shared memory limit to the device's maximum."""
        code = compile.compiled(kernel, self._architecture(device)[0])
        self.make_current(device)
        function = driver.moduleGetFunction(driver.moduleLoadData(code.image), code.name)
        most = _most_shared_bytes(device) - driver.funcGetAttribute(_STATIC_SHARED_BYTES, function)
        driver.funcSetAttribute(function, _MOST_DYNAMIC_SHARED_BYTES, most)
        return int(function)

    def make_current(self, device: int) -> None:
        """Make the primary context current, which torch uses too."""
        runtime.setDevice(device)

    @staticmethod
    def _architecture(device: int) -> tuple[str, int]:
        major, minor = torch.cuda.get_device_capability(device)
        if major * 10 + minor < OLDEST:
            raise RuntimeError(f"a device of compute capability {major}.{minor}; the kernels need 8.0 or newer")
        return compile.architecture(major * 10 + minor)
