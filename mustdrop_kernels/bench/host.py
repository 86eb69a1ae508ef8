# SPDX-License-Identifier: Apache-2.0
"""Host time of a call of each Triton operator, at LLaVA-1.5's shapes, on a machine with no GPU.

The kernels are compiled for a real target and launched by a driver that does nothing. The times therefore cover the
Python code: looking up the plan, creating the tensors of results and workspace (without memory), selecting the kernel.
They exclude torch's allocator, the packing of arguments in C and the launch itself. The second column uses Triton's own
launch path.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from .. import backends
from ..backends.triton import configs, defined, interpreted, launch
from ..errors import Refusal
from ..ops.contract import CONTRACTS
from ..ops.samples import sample
from . import machine
from .documents import Document, Sheet, Tell, note, reader

FORMAT = "mustdrop-host/1"
read = reader(FORMAT, "mustdrop bench host")


class Driver:
    """Driver of an absent GPU; counts launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        """Index of the device."""
        return -1  # of tensors without a GPU

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """A launch that does nothing."""

        def run(*_: object) -> None:
            self.launches += 1

        return run


def calls() -> dict[str, Callable[[], Any]]:
    """The sample call of each operator that has Triton kernels.

    Tensors have no memory, except the caches of in-place operators, whose addresses must differ.
    """
    implementation = backends.get("triton").implementation
    return {
        op: partial(implementation(op), **sample(op, "cpu" if contract.writes else "meta", torch.float16))
        for op, contract in CONTRACTS.items()
        if contract.composite or defined(op)
    }


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """Time of a call in the fastest of many short batches, the least disturbed one."""
    batch, end = 10, time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < 20 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - start) / batch * 1e6)
    return min(times)


def plan_lines(seconds: float) -> Iterator[str]:
    """Lines of a dry run."""
    names = list(calls())
    yield f"{', '.join(names)}: two ways to launch, {seconds:g} s each"
    yield f"about {2 * seconds * len(names):.0f} s, and the kernels are compiled where Triton's cache lacks them"


def run(seconds: float, command: Sequence[str] = (), tell: Tell = lambda what, share: None) -> Document:
    """Measure every operator; the document.

    Raises:
        Refusal: Triton's interpreter is on, so nothing is launched.
    """
    if interpreted():
        raise Refusal("TRITON_INTERPRET is set: nothing is launched then")
    return {
        "format": FORMAT,
        "command": list(command),
        "machine": {**machine.describe(torch.device("cpu"), torch.get_num_threads()), "triton": triton.__version__},
        "rows": _rows(seconds, tell),
    }


@contextlib.contextmanager
def _active(driver: Driver) -> Iterator[None]:
    """Triton's driver for a while; the one before may not exist, which Triton finds out when it needs it."""
    config = triton.runtime.driver
    before = getattr(config, "_active", None)
    config.set_active(driver)
    try:
        yield
    finally:
        if hasattr(config, "_active"):
            config.set_active(before)
        else:
            config.reset_active()  # Triton before 3.5


def _rows(seconds: float, tell: Tell) -> list[dict[str, Any]]:
    driver = Driver()
    rows: list[dict[str, Any]] = []
    with (
        _active(driver),
        mock.patch.object(configs, "architecture", return_value="sm90"),
        mock.patch.object(configs, "processors", return_value=132),
    ):
        every = calls()
        for name, call in every.items():
            tell(name, len(rows) / len(every))
            call()
            driver.launches = 0
            call()
            row: dict[str, Any] = {"op": name, "launches": driver.launches, "us": microseconds(call, seconds)}
            with mock.patch.object(launch, "_profiled", return_value=True):
                row["us_triton_path"] = microseconds(call, seconds)
            rows.append(row)
    return rows


def sheet(document: Document) -> Sheet:
    """Launches and microseconds of each operator."""
    rows = [
        [row["op"], str(row["launches"]), f"{row['us']:.1f} us", f"{row['us_triton_path']:.1f} us"]
        for row in document["rows"]
    ]
    about = document["machine"]
    where = note(document, about["name"], f"Python {about['python']}", f"Triton {about['triton']}")
    return Sheet(["operator", "launches", "a call", "by Triton's launcher"], rows, where)
