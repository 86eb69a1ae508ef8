# SPDX-License-Identifier: Apache-2.0
"""Available memory, and the peak of a call above what is allocated."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available(device: torch.device) -> int:
    """Bytes that can be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return _bytes("MemAvailable", Path("/proc/meminfo"))
    except OSError:
        return 8 << 30


def _bytes(field: str, file: Path = _STATUS) -> int:
    """Value of a field of a file in /proc that has kilobytes."""
    for line in file.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {field}")


def resident() -> int:
    """Bytes of this process in memory, without what the C library keeps for allocations to come."""
    ctypes.CDLL(None).malloc_trim(0)
    return _bytes("VmRSS")


def peak_extra(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a call, its results included, above those before it; None if they cannot be measured.

    On a CPU this is the growth of the resident set, so it covers what libraries allocate by themselves, and it is good
    to some ten kilobytes. On a GPU they are those of torch's allocator.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        call()
        return None
    try:
        before = resident()  # what the allocator keeps for later would hide the growth
        _CLEAR.write_text("5")  # resets the peak
    except (OSError, AttributeError):
        call()
        return None
    call()
    return max(0, _bytes("VmHWM") - before)
