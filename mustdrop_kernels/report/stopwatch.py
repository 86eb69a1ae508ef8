# SPDX-License-Identifier: Apache-2.0
"""Times of the stages, taken on the device that runs them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Times of named steps; on a GPU by events, so that measuring does not synchronize."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the block; blocks of one name add up."""
        begin = self._now()
        yield
        self._steps.append((name, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds by name since the last reading, summed; synchronizes with the device."""
        if self._cuda:
            torch.cuda.synchronize()
        milliseconds: dict[str, float] = {}
        for name, begin, end in self._steps:
            step = begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
            milliseconds[name] = milliseconds.get(name, 0.0) + step
        self._steps.clear()
        return milliseconds
