# SPDX-License-Identifier: Apache-2.0
"""Description of the machine, and its rates, measured in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import _load
from .._version import __version__

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that inputs are rotated past."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 << 20]
    for entry in _CACHES.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", entry.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]])
    return max(sizes)


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Description of the machine and of the software; measures nothing."""
    about: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "last_level_cache": last_level_cache(device),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mustdrop_kernels": __version__,
        "mustdrop_cpu_capability": _load.cpu_capability(),
        "commit": commit(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        about["compute_capability"] = f"{major}.{minor}"
    return about


def load() -> list[float] | None:
    """The system's load averages over 1, 5 and 15 minutes; None if unknown."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the package, with "+" if files differ from it.

    Outside a checkout the variable ``MUSTDROP_COMMIT`` (a copy of a tree travels without its history), else None.
    """
    root = Path(__file__).resolve().parents[2]
    given = os.environ.get("MUSTDROP_COMMIT") or None
    if not (root / ".git").exists():
        return given
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        # Results and pictures that an earlier run wrote do not change what is timed.
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "mustdrop_kernels", "csrc")
    except (OSError, subprocess.SubprocessError):
        return given
    return head + "+" if changed.strip() else head


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True)
    return run.stdout


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _seconds(call: Any, device: torch.device, repeats: int) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            times.append(event_seconds(call))
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Bytes per second, read and written, of ``copy_`` between tensors far larger than the cache.

    ``quick`` is for CPUs: on a GPU the whole measurement takes milliseconds, and a smaller one would measure its cache.
    """
    quick = quick and device.type == "cpu"
    size = 64 << 20 if quick else max(4 * last_level_cache(device), 256 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, 3 if quick else 15)


def matrix_rate(device: torch.device, dtype: torch.dtype, quick: bool = False) -> float:
    """FLOP/s of a square ``torch.mm``; ``quick`` as in ``copy_bandwidth``."""
    quick = quick and device.type == "cpu"
    size = 8192 if device.type == "cuda" else 256 if quick else 1536
    generator = torch.Generator(device).manual_seed(0)  # the default one belongs to the baselines
    a = torch.randn(size, size, generator=generator, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, a, out=out), device, 3 if quick else 9)


def measure(device: torch.device, dtypes: list[torch.dtype], quick: bool = False) -> dict[str, Any]:
    """Rates: bytes/s of a copy, FLOP/s of a matrix product in each dtype."""
    rates = {str(dtype).removeprefix("torch."): matrix_rate(device, dtype, quick) for dtype in dtypes}
    return {"copy_bandwidth": copy_bandwidth(device, quick), "matrix_rate": rates}
