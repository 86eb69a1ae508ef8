# SPDX-License-Identifier: Apache-2.0
"""Times of one ``generate`` call: until its first token, and per token after that."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

WHAT = "prefill: from the call to the first token, vision tower included; decode: mean of the tokens after it"


class Clock(BaseStreamer):
    """Streamer that takes the time of each new token on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        if self._prompt:
            self._prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


@dataclass(frozen=True)
class Run:
    """One call."""

    tokens: list[int]
    """New tokens, without the prompt."""
    prefill_ms: float
    decode_ms: float | None
    """Per token; None where only one was generated."""


def generate(model: Any, inputs: Any, max_new_tokens: int) -> Run:
    """Greedy generation for one prompt, timed."""
    clock = Clock()
    with torch.inference_mode():
        start = time.perf_counter()
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    first, last, steps = clock.times[0], clock.times[-1], len(clock.times) - 1
    return Run(
        tokens=sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        prefill_ms=1000 * (first - start),
        decode_ms=1000 * (last - first) / steps if steps else None,
    )


@dataclass(frozen=True)
class Timing:
    """One time of several runs, in milliseconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """The median and the range."""
        return cls(statistics.median(times), min(times), max(times))


@dataclass(frozen=True)
class Runs:
    """Several calls that gave the same answer."""

    tokens: list[int]
    prefill: Timing
    decode: Timing | None
    """Per token; None where only one was generated."""

    @classmethod
    def of(cls, runs: list[Run]) -> Runs:
        """The tokens of the last run, and the times of all."""
        decode = [run.decode_ms for run in runs if run.decode_ms is not None]
        prefill = Timing.of([run.prefill_ms for run in runs])
        return cls(runs[-1].tokens, prefill, Timing.of(decode) if decode else None)
