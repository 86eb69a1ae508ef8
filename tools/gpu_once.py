# SPDX-License-Identifier: Apache-2.0
"""Calls on a device for bench/run_on_gpu.sh, in addition to the tests and the benchmark.

compute-sanitizer --tool racecheck python tools/gpu_once.py   # every operator, every variant once
python tools/gpu_once.py --coverage    # the same, and a check that it launches every CUDA kernel of csrc/
python tools/gpu_once.py --graph       # three stages in one CUDA graph, replayed on new contents
python tools/gpu_once.py --facts       # versions, tools, the GPU, and the backends that serve it, as JSON
compute-sanitizer --tool memcheck python tools/gpu_once.py planted_write   # must find a fault; likewise planted_race
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import mustdrop_kernels as mustdrop
from mustdrop_kernels import TokenType, backends
from mustdrop_kernels.ops.samples import sample

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def prompt(batch: int, length: int, queries: int) -> torch.Tensor:
    """Token types: text, an image, text queries."""
    types = torch.full((batch, length), TokenType.VISION, dtype=torch.uint8, device=DEVICE)
    types[:, :5] = TokenType.TEXT
    types[:, length - queries :] = TokenType.QUERY
    return types


def attention(dtype: torch.dtype, heads: tuple[int, int], rows: int, length: int, dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, token types."""
    q = torch.randn(2, heads[0], rows, dim, device=DEVICE).to(dtype)
    k = torch.randn(2, heads[1], length, dim, device=DEVICE).to(dtype)
    return q, k, prompt(2, length, 12)


def numbers(values: list[int]) -> torch.Tensor:
    """int32 tensor of lengths."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def samples() -> None:
    """Sample call of every operator that is served on the device."""
    for op in backends.OPS:
        if backends.serving(op, DEVICE):
            for dtype in FLOATS:
                getattr(mustdrop, op)(**sample(op, DEVICE, dtype))


def scores() -> None:
    """Dense, packed and paged; with and without lse; one tile of query rows and several; head sizes of every kind."""
    for dtype in FLOATS:
        for dim in (64, 80, 128, 256, 33):
            q, k, types = attention(dtype, (8, 4), 90, 200, dim)
            mustdrop.text_vision_scores(q, k, types, dim**-0.5)
            mustdrop.text_vision_scores(q, k, types, dim**-0.5, lse=torch.zeros(2, 8, 90, device=DEVICE))
            mustdrop.text_vision_attention(q, k, types, dim**-0.5, 12)
            cu_q, cu_k = numbers([0, 90, 180]), numbers([0, 200, 400])
            packed_q, packed_k = q.transpose(1, 2).reshape(180, 8, dim), k.transpose(1, 2).reshape(400, 4, dim)
            mustdrop.text_vision_scores_varlen(packed_q, packed_k, types.flatten(), cu_q, cu_k, 90, 200, dim**-0.5)
            cache = packed_k.reshape(25, 16, 4, dim)
            table = torch.arange(24, dtype=torch.int32, device=DEVICE).view(2, 12)
            paged_types = types[:, :192].contiguous()
            mustdrop.text_vision_scores_paged(
                packed_q, cache, table, numbers([190, 180]), paged_types, cu_q, 90, dim**-0.5
            )
            mustdrop.cls_attention(q[:, :4, 0], k, dim**-0.5)
            mustdrop.cls_attention(q[:, :4, 0], k, dim**-0.5, counts=numbers([150, 0]))
        q, k, types = attention(dtype, (8, 8), 300, 700, 64)
        types[:, -200:] = TokenType.QUERY  # more than one tile of query rows
        mustdrop.text_vision_scores(q, k, types, 0.125)


def merging() -> None:
    """A cluster, two launches, four launches; 16-byte and single-element accesses."""
    rules = ({}, {"budget": 20}, {"uniform": True}, {"merged_first": True}, {"threshold": -1.0})
    for dtype in FLOATS:
        for channels in (64, 33, 1024):
            x = torch.randn(2, 1 + 24 * 24, channels, device=DEVICE).to(dtype)
            for options in rules:
                mustdrop.spatial_merge(x, [24, 24], [3, 3], **options)
        for channels in (32, 33):
            x = torch.randn(2, 66 * 64, channels, device=DEVICE).to(dtype)
            for options in rules:
                mustdrop.spatial_merge(x, [66, 64], [1, 2], num_prefix_tokens=0, **options)


def selecting() -> None:
    """One block, a cluster, rows that do not fit into shared memory; the fused forms."""
    for dtype in FLOATS:
        for length in (200, 30_000, 600_000):
            ranking, types = torch.rand(2, length, device=DEVICE).to(dtype), prompt(2, length, 12)
            mustdrop.select_dual(ranking, ranking, types, 1e-4, 0.5, drop_multiple=16)
            mustdrop.select_topk(ranking, types, 64, protected=ranking > 0.99)
        q, k, types = attention(dtype, (8, 4), 90, 200, 64)
        mustdrop.topk_attention_select(q, k, types, 0.125, 40, capacity=80)
        mustdrop.dual_attention_select(q, k, types, 0.125, 0.01, 0.01)


def moving() -> None:
    """Every access size; few and many layers; few long heads; dense and paged, at the front and at the end."""
    keep, counts = torch.arange(0, 3900, 3, device=DEVICE).expand(2, -1).contiguous(), numbers([1300, 700])
    for dtype in (torch.bfloat16, torch.float32, torch.uint8):
        for dim in (64, 3, 1):
            x = torch.randn(2, 4000, 3, dim, device=DEVICE).to(dtype)
            mustdrop.gather_tokens(x, keep, counts)
            mustdrop.gather_tokens(x.transpose(1, 2)[..., : dim // 2 + 1].transpose(1, 2), keep, counts, align_end=True)
            caches = [torch.randn(2, 4, 4000, dim, device=DEVICE).to(dtype) for _ in range(4)]
            mustdrop.compact_kv_(caches[:2], caches[2:], [keep], [counts])
    long = torch.arange(0, 20_000, 2, device=DEVICE)[None]
    for dtype, dim in ((torch.bfloat16, 128), (torch.uint8, 255)):
        for align_end in (False, True):
            one = [torch.randn(1, 2, 20_000, dim, device=DEVICE).to(dtype) for _ in range(2)]
            mustdrop.compact_kv_(one[:1], one[1:], [long], [numbers([9_900])], align_end=align_end)
    for layers in (2, 22):
        caches = [torch.randn(2, 4, 4000, 64, device=DEVICE).bfloat16() for _ in range(2 * layers)]
        mustdrop.compact_kv_(caches[:layers], caches[layers:], [keep], [counts])
        mustdrop.compact_kv_(caches[:layers], caches[layers:], [keep], [counts], align_end=True)
    pages = [torch.randn(500, 16, 4, 64, device=DEVICE).bfloat16() for _ in range(4)]
    table = torch.randperm(500, device=DEVICE).int().view(2, 250)
    mustdrop.compact_paged_kv_(pages[:2], pages[2:], table, [keep], [counts])
    mustdrop.compact_paged_kv_(
        pages[:2], pages[2:], table, [keep], [counts], seq_lens=numbers([4000, 3990]), align_end=True
    )


PLANTED = """
extern "C" __global__ void mustdrop_planted_write(int* out) {  // [threads]; the last thread writes past its end
  out[threadIdx.x + 1] = threadIdx.x;
}
extern "C" __global__ void mustdrop_planted_race(int* out) {  // [64]; no barrier before another thread reads
  __shared__ int held[64];
  held[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = held[63 - threadIdx.x];
}
"""


def planted(name: str) -> None:
    """Launch a kernel with a fault that the sanitizer must find. Its name matches the sanitizers' filter."""
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    torch.cuda._compile_kernel(PLANTED, name)(grid=(1, 1, 1), block=(64, 1, 1), args=[out])


OPERATORS: dict[str, Callable[[], None]] = {f.__name__: f for f in (samples, scores, merging, selecting, moving)}
FAULTS = {name: partial(planted, f"mustdrop_{name}") for name in ("planted_write", "planted_race")}
PARTS = {**OPERATORS, **FAULTS}


def once(names: list[str]) -> None:
    """All variants of the operators."""
    for name in names:
        print(name, flush=True)
        PARTS[name]()
        torch.cuda.synchronize()


def kernels_of_sources() -> set[str]:
    """The names of all kernels in csrc/."""
    kernel = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")
    texts = (path.read_text() for path in (ROOT / "csrc").glob("*/*.cuh"))
    return {name for text in texts for name in kernel.findall(text)}


def coverage() -> None:
    """Check that the operators launch every kernel of the sources."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once(list(OPERATORS))
    launched = {event.key for event in profile.key_averages()}
    missing = sorted(
        name for name in kernels_of_sources() if not any(f"{name}<" in k or f"{name}(" in k for k in launched)
    )
    print(f"{len(kernels_of_sources()) - len(missing)} of {len(kernels_of_sources())} kernels of csrc/ were launched")
    if missing:
        sys.exit(f"not launched: {', '.join(missing)}")


class Stages:
    """All three stages on tensors with fixed addresses, as a graph requires."""

    def __init__(self) -> None:
        self.x = torch.empty(2, 1 + 24 * 24, 64, device=DEVICE, dtype=torch.bfloat16)
        self.q = torch.empty(2, 8, 90, 64, device=DEVICE, dtype=torch.bfloat16)
        self.k = torch.empty(2, 4, 200, 64, device=DEVICE, dtype=torch.bfloat16)
        self.hidden = torch.empty(2, 200, 64, device=DEVICE)
        self.caches = [torch.empty(2, 4, 200, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(6)]
        self.types = prompt(2, 200, 12)
        self.long = [torch.empty(1, 1, 12_000, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        self.half = torch.arange(0, 12_000, 2, device=DEVICE)[None], numbers([6000])

    def refill(self, seed: int) -> None:
        """New contents, the same for the same seed."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for tensor in (self.x, self.q, self.k, self.hidden, *self.caches, *self.long):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=DEVICE))

    def run(self) -> list[torch.Tensor]:
        """Merge, score the patches, choose the key set; score, select, gather the tokens; compact the caches."""
        merged = mustdrop.spatial_merge(self.x, [24, 24], [3, 3], threshold=0.1)
        votes = mustdrop.cls_attention(self.q[:, :4, 0], self.k, 0.125)
        fused = mustdrop.topk_attention_select(self.q, self.k, self.types, 0.125, 40, capacity=80)
        dual = mustdrop.select_dual(fused.total, fused.peak, self.types, 0.001, 0.01)
        taken = mustdrop.gather_tokens(self.hidden, fused.keep, fused.counts)
        mustdrop.compact_kv_(self.caches[:3], self.caches[3:], [fused.keep], [fused.counts])
        front = [cache[:, :, :40].clone() for cache in self.caches]  # unspecified past the counts
        mustdrop.compact_kv_(self.long[:1], self.long[1:], [self.half[0]], [self.half[1]])
        front += [cache[:, :, :6000].clone() for cache in self.long]
        return [*merged, votes, *fused, *dual, taken, *front]


def graph() -> None:
    """Capture the stages, replay them on other contents, compare with runs without a graph."""
    stages = Stages()
    stages.refill(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stages.run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = stages.run()
    for seed in range(1, 5):
        stages.refill(seed)
        wanted = [tensor.clone() for tensor in stages.run()]
        stages.refill(seed)
        captured.replay()
        torch.cuda.synchronize()
        for i, (got, want) in enumerate(zip(results, wanted, strict=True)):
            if not torch.equal(got, want):
                sys.exit(f"result {i} of a replayed graph is another than that of the operators")
    print(f"{len(results)} results of 4 replays are those of the operators, bit for bit")


def serving() -> list[str]:
    """Backends that serve at least one operator on a GPU, except the reference."""
    names = [name for name in backends.registered() if name != "reference"]
    return [n for n in names if any(backends.registered()[n].why_not(op, "cuda") is None for op in backends.OPS)]


def gpu() -> dict[str, object] | None:
    """The device, its driver and clocks; None without a device."""
    if not torch.cuda.is_available():
        return None
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        output = str(error)
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **dict(zip(fields, output.splitlines()[0].split(", "), strict=False)),
    }


def facts() -> dict[str, object]:
    """Versions and tools, to diagnose failing parts."""
    modules = (
        "setuptools",
        "ninja",
        "cmake",
        "pybind11",
        "pytest",
        "xdist",
        "hypothesis",
        "triton",
        "cupy",
        "transformers",
        "vllm",
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu(),
        "backends": serving(),
        "modules": {name: importlib.util.find_spec(name) is not None for name in modules},
        "tools": {name: shutil.which(name) for name in ("nvcc", "cmake", "ninja", "g++", "compute-sanitizer")},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: the operators)")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--facts", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if options.facts:
        print(json.dumps(facts(), indent=1))
        return
    if not torch.cuda.is_available():
        sys.exit("gpu_once: torch finds no GPU")
    torch.manual_seed(0)
    if options.coverage:
        coverage()
    elif options.graph:
        graph()
    else:
        once(options.parts or list(OPERATORS))


if __name__ == "__main__":
    main()
