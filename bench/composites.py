# SPDX-License-Identifier: Apache-2.0
"""Time of the composite operators on a CPU: the C++ override beside the composite of its parts, in alternating rounds.

python bench/composites.py
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mustdrop_kernels.bench.units import duration
from mustdrop_kernels.ops.contract import CONTRACTS, composed
from mustdrop_kernels.ops.samples import sample

ROUNDS = 60


def llava(op: str) -> dict[str, Any]:
    """The sample call with LLaVA-1.5-7B's prompt: 35 text, 576 vision and 60 query tokens, 32 heads of 128."""
    q, k = torch.randn(1, 32, 671, 128), torch.randn(1, 32, 671, 128)
    types = torch.tensor([1] * 35 + [2] * 576 + [3] * 60, dtype=torch.uint8)[None]
    rest = {name: v for name, v in sample(op).items() if not isinstance(v, torch.Tensor) and name != "capacity"}
    return {**rest, "q": q, "k": k, "token_types": types, "scale": 128**-0.5}


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Mean time of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    """Print a line for each operator and shape."""
    torch.set_num_threads(1)
    for shape, make, calls in (("14 tokens", sample, 300), ("LLaVA-1.5", llava, 2)):
        for op in (name for name, contract in CONTRACTS.items() if contract.composite):
            given = make(op)
            override = getattr(torch.ops.mustdrop, op)
            composite = composed(op, lambda part: getattr(torch.ops.mustdrop, part))
            pairs = []
            for _ in range(ROUNDS):
                one = microseconds(lambda: override(**given), calls)  # noqa: B023
                pairs.append((one, microseconds(lambda: composite(**given), calls)))  # noqa: B023
            first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
            quartiles = statistics.quantiles([b - a for a, b in pairs])
            spread = " to ".join(f"{quartiles[i]:+.1f}" for i in (0, 2))
            print(f"{shape}: {op} {duration(first)}, composite {duration(second)}; difference {spread} us")
    print(f"load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
