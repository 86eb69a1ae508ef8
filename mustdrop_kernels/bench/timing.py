# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: each times every candidate briefly, so that drift of the machine affects all of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence

import torch

from . import capture
from .cases import Inputs, Raw
from .machine import event_seconds

Call = Callable[[Inputs], Raw]
CHUNK = 1e-3  # seconds of calls that are timed as one


@dataclasses.dataclass(frozen=True)
class Effort:
    """Effort of a measurement."""

    seconds: float  # for each candidate of a case
    least: int  # rounds of a candidate that takes less than a second
    most: int = 200

    def rounds(self, chunk_seconds: float) -> int:
        """Rounds for a candidate by the time of its chunk: slow ones get few."""
        least = self.least if chunk_seconds < 1 else min(self.least, 3) if chunk_seconds < 8 else 1
        return max(least, min(self.most, int(self.seconds / chunk_seconds)))


FULL = Effort(seconds=2.0, least=7)
QUICK = Effort(seconds=0.1, least=3)


@dataclasses.dataclass
class Timing:
    """Times of one candidate in seconds a call, one for each of its rounds."""

    samples: dict[int, float]  # round -> seconds
    calls: int  # in each round
    how: str  # "cpu", "graph" (a CUDA graph is replayed), "eager" (it cannot be captured)
    host: float | None = None  # seconds that the host is busy with a call, on a GPU
    why_eager: str | None = None  # why it cannot be captured

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """(first quartile, median, third quartile)."""
        return quartiles(list(self.samples.values()))

    def ratio_to(self, base: Timing) -> tuple[float, float, float]:
        """Quartiles of the ratio of this time to the base's, both from the same rounds."""
        pairs = [seconds / base.samples[r] for r, seconds in self.samples.items() if r in base.samples]
        if not pairs:
            pairs = [seconds / base.quartiles[1] for seconds in self.samples.values()]
        return quartiles(pairs)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), all equal for one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


class Rotation:
    """Rotation of input copies, so that none is in the cache when it is used again."""

    def __init__(self, copies: Sequence[Inputs]) -> None:
        self.copies = copies
        self._next = 0

    def take(self) -> Inputs:
        """The next copy."""
        inputs = self.copies[self._next]
        self._next = (self._next + 1) % len(self.copies)
        return inputs


def _taking_part(rounds: int, total: int) -> set[int]:
    """Numbers of the rounds of a candidate, evenly spread over all."""
    return {math.floor(i * total / rounds) for i in range(rounds)}


class _OnCpu:
    how, why_eager = "cpu", None

    def __init__(self, call: Call, rotation: Rotation, compiled: bool) -> None:
        self.call, self.rotation = call, rotation
        self.calls = 1
        single = min(self.seconds() for _ in range(2))
        self.calls = max(1, min(1000, math.ceil(CHUNK / max(single, 1e-7))))
        self.estimate = single * self.calls
        self.host: float | None = None

    def seconds(self) -> float:
        """Seconds of a chunk of calls."""
        call, chosen = self.call, [self.rotation.take() for _ in range(self.calls)]
        start = time.perf_counter()
        for inputs in chosen:
            call(inputs)
        return time.perf_counter() - start


class _OnCuda:
    """All copies of the inputs in one CUDA graph; calls that cannot be captured run one by one instead."""

    def __init__(self, call: Call, rotation: Rotation, compiled: bool) -> None:
        self.call, self.copies = call, rotation.copies
        self.calls = len(self.copies)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why_eager = capture.why_not(self._first, traced=not compiled)
        if self.why_eager is None:
            self.graph, self.why_eager = capture.capture(self._all, self._first)
        self.how = "eager" if self.graph is None else "graph"
        self.host = self._host_seconds()
        self.estimate = self.seconds()

    def _first(self) -> None:
        self.call(self.copies[0])

    def _all(self) -> None:
        for inputs in self.copies:
            self.call(inputs)

    def _host_seconds(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for inputs in self.copies[:20]:
            self.call(inputs)
        passed = time.perf_counter() - start
        torch.cuda.synchronize()
        return passed / len(self.copies[:20])

    def seconds(self) -> float:
        """Seconds of one call on each copy."""
        return event_seconds(self._all if self.graph is None else self.graph.replay)


def interleaved(
    calls: dict[str, Call],
    copies: Sequence[Inputs],
    device: torch.device,
    effort: Effort,
    compiled: Collection[str] = (),
) -> dict[str, Timing]:
    """Time all calls. They must have run before, so that nothing compiles or initializes here.

    Args:
        calls: by name.
        copies: inputs with the same values in different memory.
        device: of the copies.
        effort: duration of the measurement.
        compiled: names of calls that torch.compile made.
    """
    rotation = Rotation(copies)
    make = _OnCuda if device.type == "cuda" else _OnCpu
    runners = {name: make(call, rotation, name in compiled) for name, call in calls.items()}
    rounds = {name: effort.rounds(max(runner.estimate, 1e-7)) for name, runner in runners.items()}
    total = max(rounds.values(), default=0)
    turns = {name: _taking_part(n, total) for name, n in rounds.items()}
    samples: dict[str, dict[int, float]] = {name: {} for name in runners}
    names = list(runners)
    for r in range(total):
        first = r % len(names)  # the order rotates
        for name in names[first:] + names[:first]:
            if r in turns[name]:
                samples[name][r] = runners[name].seconds() / runners[name].calls
    return {
        name: Timing(samples[name], runner.calls, runner.how, runner.host, runner.why_eager)
        for name, runner in runners.items()
    }
