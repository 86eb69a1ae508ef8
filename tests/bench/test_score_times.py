# SPDX-License-Identifier: Apache-2.0
"""Times of the CUDA scores from cycles and launches, worked out by hand."""

from __future__ import annotations

import pytest
from cuda_static.launches import Launch
from cuda_static.model import TABLE, Estimate, parse_table
from cuda_static.score_times import Kernel, estimate, head_cycles, time_table

from mustdrop_kernels.bench.shapes import parse_shape

WIDE = "score_kernel<bfloat16_t, 2, {}, true>"
CYCLES = {
    "slab": 1000, "last slab": 2000, "one block": 5000, "cluster": 5400, "next tile": 3400,
}  # fmt: skip


def cycles(label: str) -> dict[str, Estimate]:
    """The named loops of a kernel; those of the normalizer are twice as long."""
    named = {f"score {label}: {part}": value for part, value in CYCLES.items()}
    named |= {f"normalizer {label}: {part}": 2 * value for part, value in CYCLES.items()}
    return {name: Estimate(name, "", 0, value, 1, "") for name, value in named.items()}


def test_kernels_of_launches():
    assert Kernel.of(Launch("", "", WIDE.format("true"), 1, 256, 0, 1)) == Kernel("128 keys", 128, 2)
    assert Kernel.of(Launch("", "", "score_kernel<half_t, 1, false, true>", 1, 256, 0, 1)).label == "64 keys"
    single = Kernel.of(Launch("", "", "normalizer_kernel<float, 1, true>", 1, 256, 0, 1))
    assert (single.label, single.slab) == ("float32", 32)


def test_limits_of_a_head():
    """112 rows of 128 elements: 1,445 cycles of products, 896 of exponentials, 61,440 bytes."""
    shape, kernel = parse_shape("video-mha"), Kernel("128 keys", 128, 2)
    assert head_cycles(kernel, shape, 3000) == (3000, "latency")
    assert head_cycles(kernel, shape, 2600) == (round(61440 / 23), "level-2 cache")
    grouped = parse_shape("video-gqa")  # keys are copied once for seven heads
    assert head_cycles(kernel, grouped, 2000) == (
        round(128 * 112 * 128 / 0.62 / 2048 + 896),
        "products and exponentials",
    )


def test_times():
    """Five tiles of a block with eight heads, and 40 tiles of keys for each of four parts of a head."""
    given = Launch("video-mha", "text_vision_scores (lse given)", WIDE.format("true"), 128, 256, 0, 4)
    own = Launch("video-mha", "text_vision_scores", WIDE.format("false"), 128, 256, 0, 4)
    parts = Launch("video-mha", "text_vision_scores", "normalizer_kernel<bfloat16_t, 2, true>", 128, 256, 0, 4)
    first, second = estimate([parts, own, given], cycles("128 keys"))
    scores = (5400 - 1000 + 600) + 4 * (3400 - 1000 + 600) + 40 * 3000
    assert (second.rounds, second.heads, second.head, second.start, second.again) == (5, 8, 3000, 5000, 3000)
    assert second.microseconds == pytest.approx(3 + scores / 1830, abs=0.05)
    normalizers = (10800 - 2000 + 600) + 40 * 6000
    assert first.microseconds == pytest.approx(4 + (scores + normalizers) / 1830, abs=0.05)
    assert time_table([first, second]).splitlines()[2].split()[-2:] == [f"{second.microseconds:.1f}", "latency"]


def test_all_loops_are_in_the_table():
    names = {row.name for row in parse_table(TABLE.read_text())}
    wanted = {f"score {label}: {part}" for label in ("128 keys", "64 keys", "float32") for part in CYCLES}
    assert wanted <= names
