# SPDX-License-Identifier: Apache-2.0
"""Times of the CUDA scores on an H200, composed from the cycles of their loops and from their launches.

An estimate and no measurement. The cycles of a head are the most of the latency of one warp (see model.py), the rate of
the matrix instructions and exponentials, and that of the level-2 cache. Blocks are resident, with one on a
multiprocessor, so the time is that of the block with the most tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mustdrop_kernels.bench.shapes import Shape, parse_shape

from .launches import GPU, GPUS, Launch
from .model import Estimate

SHAPES = ("llava-1.5", "llava-next", "video-mha", "video-gqa")
OP = "text_vision_scores"

CLOCK = 1.83  # cycles of a nanosecond
LAUNCH, DEPENDENT_LAUNCH = 3.0, 1.0  # us: of the first kernel, and of one that overlaps the end of the previous one
ARRIVAL = 600  # cycles from the start of a copy to its operands in shared memory, where nothing overlaps it
PRODUCTS = {2: 0.62 * 2048, 4: 128}  # multiply-adds of a cycle and multiprocessor, by bytes of an element
EXPONENTIALS = 16  # of a cycle and multiprocessor
LEVEL_2 = 23  # bytes of a cycle and multiprocessor


@dataclass(frozen=True)
class Kernel:
    """A tile of the scores: 64 or 128 keys, bfloat16 or float32."""

    label: str  # "128 keys", as in loops.txt
    keys: int
    bytes: int  # of an element

    @property
    def slab(self) -> int:
        """Elements of a slab."""
        return 128 // self.bytes

    @classmethod
    def of(cls, launch: Launch) -> Kernel:
        """The kernel of a launch, from its template arguments."""
        found = re.search(r"<(\w+), (\d), .*true>", launch.kernel)
        assert found is not None, launch.kernel
        keys = 64 * int(found[2])
        return cls("float32", keys, 4) if found[1] == "float" else cls(f"{keys} keys", keys, 2)


@dataclass(frozen=True)
class Time:
    """Estimate for one shape."""

    shape: str
    kernel: str
    given: bool  # lse
    rounds: int  # tiles that a block processes one after the other
    heads: int  # of a block and tile
    head: int  # cycles of a head and tile
    start: int  # cycles before and after the heads: of the first tile
    again: int  # and of a further one
    limit: str  # what determines the cycles of a head
    microseconds: float


def head_cycles(kernel: Kernel, shape: Shape, latency: int) -> tuple[int, str]:
    """Cycles of a head and tile of a multiprocessor, and their limit.

    Args:
        kernel: the tile.
        shape: heads, head dimension and rows.
        latency: cycles of one warp.
    """
    rows = math.ceil(shape.queries / 16) * 16
    products = kernel.keys * rows * shape.head_dim / PRODUCTS[kernel.bytes] + kernel.keys * rows / EXPONENTIALS
    keys = kernel.keys / (shape.heads // shape.kv_heads)  # they stay in shared memory for the heads of a group
    cache = (keys + rows) * shape.head_dim * kernel.bytes / LEVEL_2
    limits = {"latency": float(latency), "products and exponentials": products, "level-2 cache": cache}
    limit = max(limits, key=lambda name: limits[name])
    return round(limits[limit]), limit


def _parts(cycles: Mapping[str, Estimate], name: str, kernel: Kernel) -> dict[str, int]:
    """Cycles of the named loops of a kernel, by the part after "score 128 keys: "."""
    prefix = f"{name} {kernel.label}: "
    return {loop.removeprefix(prefix): found.cycles for loop, found in cycles.items() if loop.startswith(prefix)}


def estimate(launches: Sequence[Launch], cycles: Mapping[str, Estimate]) -> list[Time]:
    """Times of the recorded launches, with and without lse.

    Args:
        launches: of ``OP`` and its variant at ``SHAPES``.
        cycles: the named loops of loops.txt.
    """
    times = []
    for launch in launches:
        if not launch.kernel.startswith("score_kernel") or launch.shape not in SHAPES or not launch.op.startswith(OP):
            continue
        kernel, shape = Kernel.of(launch), parse_shape(launch.shape)
        slabs = math.ceil(shape.head_dim / kernel.slab)
        score, normalizer = _parts(cycles, "score", kernel), _parts(cycles, "normalizer", kernel)
        head, limit = head_cycles(kernel, shape, (slabs - 1) * score["slab"] + score["last slab"])
        start = score["cluster" if launch.cluster > 1 else "one block"] - score["slab"] + ARRIVAL
        again = score["next tile"] - score["slab"] + ARRIVAL
        tiles = shape.batch * math.ceil(shape.length / kernel.keys)
        rounds, heads = math.ceil(tiles * launch.cluster / launch.grid), math.ceil(shape.heads / launch.cluster)
        total = start + (rounds - 1) * again + rounds * heads * head
        microseconds = LAUNCH + total / CLOCK / 1000
        given = "lse" in launch.op
        if not given:
            (other,) = (o for o in launches if (o.shape, o.op) == (launch.shape, launch.op) and "normal" in o.kernel)
            splits = other.grid // (shape.batch * shape.heads)
            parts = math.ceil(other.grid / GPUS[GPU].multiprocessors)
            begin = normalizer["cluster"] - normalizer["slab"] + ARRIVAL
            tile = head_cycles(kernel, shape, (slabs - 1) * normalizer["slab"] + normalizer["last slab"])[0]
            each = begin + math.ceil(math.ceil(shape.length / kernel.keys) / splits) * tile
            microseconds += DEPENDENT_LAUNCH + parts * each / CLOCK / 1000
        times.append(
            Time(launch.shape, launch.kernel, given, rounds, heads, head, start, again, limit, round(microseconds, 1))
        )
    return times


def time_table(times: Iterable[Time]) -> str:
    """Table with a line per shape and variant, and an explanation of the figures."""
    lines = [
        f"{'shape':<12}{'kernel':<46}{'lse':<10}tiles  heads  cycles a head  start  again      us  limit of a head"
    ]
    for t in times:
        lines.append(
            f"{t.shape:<12}{t.kernel:<46}{'given' if t.given else 'computed':<10}{t.rounds:>5}{t.heads:>7}"
            f"{t.head:>15}{t.start:>7}{t.again:>7}{t.microseconds:>8.1f}  {t.limit}"
        )
    lines += [
        "Tiles and heads are those that a block processes one after the other.",
        f"{CLOCK} GHz; {LAUNCH:g} us a launch, {DEPENDENT_LAUNCH:g} us one that overlaps another; copies arrive",
        f"after {ARRIVAL} cycles. An estimate and no measurement.",
    ]
    return "\n".join(lines)
