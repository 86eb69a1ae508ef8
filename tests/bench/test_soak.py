# SPDX-License-Identifier: Apache-2.0
"""bench/soak.py distinguishes growing memory from flat memory, and reports what remains undecided."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

SOAK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench" / "soak.py"))


def hour(kb_per_hour, rounds=200, warm_up=0):
    """Memory of about 800 MiB with noise, which first fills up and then grows."""
    noise = np.random.default_rng(0).normal(0, 500, rounds)
    times = np.linspace(10, 3600, rounds)
    sizes = 800_000 - warm_up * np.exp(-times / 300) + kb_per_hour * times / 3600 + noise
    return [(float(time), int(size)) for time, size in zip(times, sizes, strict=True)]


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        (hour(0), "flat"),
        (hour(0, warm_up=300_000), "flat"),
        (hour(4_000), "flat"),  # half of the limit
        (hour(20_000), "grows"),
        (hour(8_000), "unknown: run longer"),  # about the limit
        (hour(0)[:6], "unknown: run longer"),
    ],
)
def test_verdicts(samples, verdict):
    assert SOAK["growth"](samples)["verdict"] == verdict


def test_slope_and_interval():
    found = SOAK["growth"](hour(20_000))
    low, high = found["interval"]
    assert low < found["kb_per_hour"] < high
    assert low < 20_000 < high
    assert found["flat_below_kb_per_hour"] == pytest.approx(8_150, rel=0.01)
