# SPDX-License-Identifier: Apache-2.0
"""Every CUDA operator once, at sizes that take each of its ways; for compute-sanitizer. With --graph: the operators of
a whole stage captured in one CUDA graph and replayed on new contents, against the reference.

    compute-sanitizer --tool racecheck python bench/gpu_once.py
    python bench/gpu_once.py --graph
"""

from __future__ import annotations

import argparse
import sys

import torch

import mustdrop_kernels as mustdrop
from mustdrop_kernels import TokenType

DEVICE = "cuda"


def prompt(batch: int, length: int, queries: int) -> torch.Tensor:
    """Text, a picture, text that votes."""
    types = torch.full((batch, length), TokenType.VISION, dtype=torch.uint8, device=DEVICE)
    types[:, :5] = TokenType.TEXT
    types[:, length - queries :] = TokenType.QUERY
    return types


def attention(dtype: torch.dtype, heads: tuple[int, int], rows: int, length: int, dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, token types."""
    q = torch.randn(2, heads[0], rows, dim, device=DEVICE).to(dtype)
    k = torch.randn(2, heads[1], length, dim, device=DEVICE).to(dtype)
    return q, k, prompt(2, length, 12)


def once() -> None:
    """Each operator's kernels: matrix and plain, one block and a cluster, dense, packed and paged."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (64, 80, 128, 256, 33):
            q, k, types = attention(dtype, (8, 4), 90, 200, dim)
            total, peak = mustdrop.text_vision_scores(q, k, types, dim**-0.5)
            lse = torch.zeros(2, 8, 90, device=DEVICE)
            mustdrop.text_vision_scores(q, k, types, dim**-0.5, lse=lse)
            mustdrop.text_vision_attention(q, k, types, dim**-0.5, 12)
            cu_q = torch.tensor([0, 90, 180], dtype=torch.int32, device=DEVICE)
            cu_k = torch.tensor([0, 200, 400], dtype=torch.int32, device=DEVICE)
            packed_q, packed_k = q.transpose(1, 2).reshape(180, 8, dim), k.transpose(1, 2).reshape(400, 4, dim)
            mustdrop.text_vision_scores_varlen(packed_q, packed_k, types.flatten(), cu_q, cu_k, 90, 200, dim**-0.5)
            cache, table = (
                packed_k.reshape(25, 16, 4, dim),
                torch.arange(24, dtype=torch.int32, device=DEVICE).view(2, 12),
            )
            lengths = torch.tensor([190, 180], dtype=torch.int32, device=DEVICE)
            mustdrop.text_vision_scores_paged(packed_q, cache, table, lengths, types, cu_q, 90, dim**-0.5)
            mustdrop.cls_attention(q[:, :4, 0], k, dim**-0.5)
        x = torch.randn(2, 1 + 24 * 24, 64, device=DEVICE).to(dtype)
        for options in ({}, {"budget": 20}, {"uniform": True}, {"merged_first": True}, {"threshold": -1.0}):
            mustdrop.spatial_merge(x, [24, 24], [3, 3], **options)
    for length in (200, 30000):
        scores, types = torch.rand(2, length, device=DEVICE), prompt(2, length, 12)
        mustdrop.select_dual(scores, scores, types, 1e-4, 0.5, drop_multiple=16)
        keep, counts = mustdrop.select_topk(scores, types, 64)
        mustdrop.gather_tokens(torch.randn(2, length, 96, device=DEVICE), keep, counts)
    keep, counts = keep % 4000, counts  # past the last kept token they are not looked at
    keep = keep.sort(-1).values
    for layers in (2, 22):
        caches = [torch.randn(2, 4, 4000, 64, device=DEVICE).bfloat16() for _ in range(2 * layers)]
        mustdrop.compact_kv_(caches[:layers], caches[layers:], [keep], [counts])
        mustdrop.compact_kv_(caches[:layers], caches[layers:], [keep], [counts], align_end=True)
    pages = [torch.randn(500, 16, 4, 64, device=DEVICE).bfloat16() for _ in range(4)]
    table = torch.randperm(500, device=DEVICE).int()[:500].view(2, 250).contiguous()
    mustdrop.compact_paged_kv_(pages[:2], pages[2:], table, [keep], [counts])
    del total, peak
    torch.cuda.synchronize()


def stage(q: torch.Tensor, k: torch.Tensor, types: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Prefill: score, select, take the tokens."""
    keep, counts, total, peak = mustdrop.topk_attention_select(q, k, types, 0.125, 40, capacity=80)
    return keep, counts, total, peak, mustdrop.gather_tokens(hidden, keep, counts)


def graph() -> None:
    """Capture the stage, replay it on other contents, compare with the stage run without a graph."""
    q, k, types = attention(torch.bfloat16, (8, 4), 90, 200, 64)
    hidden = torch.randn(2, 200, 64, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stage(q, k, types, hidden)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = stage(q, k, types, hidden)
    for _ in range(3):
        for tensor in (q, k, hidden):
            tensor.copy_(torch.randn_like(tensor))
        captured.replay()
        wanted = stage(q, k, types, hidden)
        torch.cuda.synchronize()
        for got, want in zip(results, wanted, strict=True):
            if not torch.equal(got, want):
                raise SystemExit("a replayed graph gives another result than the operators do")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_once: torch finds no GPU")
    graph() if options.graph else once()


if __name__ == "__main__":
    main()
