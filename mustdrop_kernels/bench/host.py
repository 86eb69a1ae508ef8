# SPDX-License-Identifier: Apache-2.0
"""Host time of a call of each Triton operator, at LLaVA-1.5's shapes, on a machine with no GPU.

The kernels are compiled for a real target and handed to a driver that does nothing. So this counts what Python does:
finding the plan, making the tensors of results and workspace (without memory behind them), choosing the kernel. It
leaves out what lies below: taking memory from torch's cache, packing the arguments in C, and the launch itself. The
second column takes Triton's own way to each launch.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from mustdrop_kernels.backends.triton import configs, implementation, interpreted, launch
from mustdrop_kernels.files import write_text


class Driver:
    """Knows a GPU that is not there; counts launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        return -1  # what tensors say that are on no GPU

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def run(*_: object) -> None:
            self.launches += 1

        return run


def calls() -> dict[str, Callable[[], Any]]:
    """LLaVA-1.5, one picture: 576 patches, 671 tokens, 32 heads, 13 layers cut at once."""
    half, long, integer = torch.float16, torch.int64, torch.int32

    def new(*shape: int, dtype: torch.dtype = half, device: str = "meta") -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, hidden = new(1, 577, 1024), new(1, 671, 4096)
    q, k, types = new(1, 32, 60, 128), new(1, 32, 671, 128), new(1, 671, dtype=torch.uint8)
    scores, keep, counts = new(1, 671, dtype=torch.float32), new(1, 159, dtype=long), new(1, dtype=integer)
    # In place: nothing is allocated, and addresses have to differ.
    keys, values = ([new(1, 32, 671, 128, device="cpu") for _ in range(13)] for _ in range(2))
    cls_q, cls_k = new(1, 16, 64), new(1, 16, 577, 64)
    arguments: dict[str, tuple[Any, ...]] = {
        "spatial_merge": (x, [24, 24], [3, 3]),
        "cls_attention": (cls_q, cls_k, 0.125),
        "text_vision_scores": (q, k, types, 0.1),
        "select_dual": (scores, scores, types, 0.01, 0.01),
        "select_topk": (scores, types, 64),
        "topk_attention_select": (q, k, types, 0.1, 64),
        "gather_tokens": (hidden, keep, counts),
        "compact_kv_": (keys, values, [torch.empty_like(keep, device="cpu")], [torch.empty_like(counts, device="cpu")]),
    }
    return {op: partial(implementation(op), *given) for op, given in arguments.items()}


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """The fastest of many short batches: what is slower was interrupted."""
    batch, times, end = 10, [], time.perf_counter() + seconds
    while len(times) < 20 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - start) / batch * 1e6)
    return min(times)


def measure(seconds: float) -> list[dict[str, Any]]:
    """A row for each operator."""
    driver, rows = Driver(), []
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(configs, "architecture", return_value="sm90"),
        mock.patch.object(configs, "processors", return_value=132),
    ):
        for name, call in calls().items():
            call()
            driver.launches = 0
            call()
            row: dict[str, Any] = {"op": name, "launches": driver.launches, "us": microseconds(call, seconds)}
            with mock.patch.object(launch, "_profiled", return_value=True):
                row["us_triton_path"] = microseconds(call, seconds)
            rows.append(row)
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set: nothing is launched then")
    rows = measure(options.seconds)
    print(f"Triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}; us a call")
    print(f"{'':24}{'launches':>9}{'here':>9}{'by Triton':>11}")
    for row in rows:
        print(f"{row['op']:24}{row['launches']:>9}{row['us']:>9.1f}{row['us_triton_path']:>11.1f}")
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
        write_text(options.json, json.dumps({**versions, "processor": platform.processor(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
