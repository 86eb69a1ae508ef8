# SPDX-License-Identifier: Apache-2.0
"""``spatial_merge``: merging of windows of similar tokens (MustDrop, stage 1)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .contract import Call, Gradient, define
from .dispatch import call

__all__ = ["SpatialMerge", "spatial_merge"]


class SpatialMerge(NamedTuple):
    """Result of ``spatial_merge``: N' <= N rows after the P rows of the prefix."""

    tokens: Tensor  # (B, P+N', C)
    counts: Tensor  # (B) int32, prefix included
    assignment: Tensor  # (B, P+N) int64: the row of `tokens` that each input token went into
    sizes: Tensor  # (B, P+N') float32: number of input tokens that each token represents


def spatial_merge(
    x: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    threshold: float = 0.8,
    *,
    budget: int | None = None,
    uniform: bool = False,
    num_prefix_tokens: int = 1,
    sizes: Tensor | None = None,
    merged_first: bool = False,
    backend: str | None = None,
) -> SpatialMerge:
    """Merge windows of similar neighboring tokens into their weighted mean.

    MustDrop (arXiv 2411.10803), stage 1, local spatial merging. A window of n tokens merges iff the mean of
    cos(x_i, x_j) over its ordered pairs i != j is at least ``threshold``. With u = x / max(|x|, 1e-8) this mean equals
    (|sum u|^2 - sum |u|^2) / (n (n - 1)), which costs O(n) instead of O(n^2).

    Args:
        x: (B, P+N, C) float32, float16 or bfloat16: P prefix tokens (CLS, registers), then N = prod(grid) patches in
            row-major order.
        grid: [H, W], or [T, H, W] for video, in patches.
        window: size of a window in patches, as many entries as ``grid``. Windows tile the grid from its origin; the
            border cuts windows that do not fit. A window of one token never merges.
        threshold: minimum similarity of a window that merges, a cosine; rounded to float32.
        budget: number of windows that merge in each image, the most similar ones; ``threshold`` is not used. The
            windows must tile the grid. The result then has the static length P + N - budget * (n - 1).
        uniform: merge as many windows in every image of the batch as in the image with the fewest similar ones.
            Windows that the border cuts do not merge then. Excludes ``budget``.
        num_prefix_tokens: P.
        sizes: (B, P+N) float32, number of original tokens that each token stands for; default: ones.
        merged_first: order the result as prefix, merged windows by falling similarity, the rest in raster order, as the
            published code does. Default: a merged window takes the place of its first token.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        tokens (B, P+N', C) in the dtype of ``x``, zero past counts; counts (B) int32, prefix included; assignment
        (B, P+N) int64, the row of ``tokens`` that each input token went into; sizes (B, P+N') float32, zero past
        counts. N' = N without ``budget``. Differentiable in ``x``, with the assignment held fixed.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    options = {
        "budget": budget,
        "uniform": uniform,
        "num_prefix_tokens": num_prefix_tokens,
        "sizes": sizes,
        "merged_first": merged_first,
    }
    return SpatialMerge(*call("spatial_merge", backend, x, list(grid), list(window), threshold, **options))


def _check(a: Call) -> None:
    check = Checker(a, a.x)
    grid, window = a.grid, a.window
    check.tensor("x", a.x, ("B", "P+N", "C"), FLOATS)
    check(len(grid) in (2, 3), "grid", f"must be [H, W] or [T, H, W], got {list(grid)}")
    check(len(window) == len(grid), "window", f"must have as many entries as grid, got {list(window)}")
    for size, extent in zip(grid, window, strict=True):
        check(size >= 0, "grid", f"must not be negative, got {list(grid)}")
        check(extent >= 1, "window", f"must be positive, got {list(window)}")
    check.at_least("num_prefix_tokens", a.num_prefix_tokens, 0)
    given = f"num_prefix_tokens {a.num_prefix_tokens} and grid {list(grid)}"
    ok = a.x.shape[1] == a.num_prefix_tokens + prod(grid)
    check(ok, "x", f"must have num_prefix_tokens + prod(grid) tokens with {given}, got {a.x.shape[1]}")
    if a.sizes is not None:
        check.tensor("sizes", a.sizes, tuple(a.x.shape[:2]), (torch.float32,))
    if a.budget is None:
        return
    check(not a.uniform, "uniform", "must not be set together with budget")
    for size, extent in zip(grid, window, strict=True):
        check(size % extent == 0, "window", f"must tile the grid {list(grid)} where budget is set, got {list(window)}")
    windows = prod(size // extent for size, extent in zip(grid, window, strict=True))
    check.at_least("budget", a.budget, 0)
    check(a.budget <= windows, "budget", f"must be at most the number of windows, {windows}, got {a.budget}")
    check(prod(window) > 1 or a.budget == 0, "budget", f"must be 0 with windows of one token, got {a.budget}")


def _fake(a: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = a.x.shape
    capacity = length if a.budget is None else length - a.budget * (prod(a.window) - 1)
    return (
        a.x.new_empty(batch, capacity, channels),
        a.x.new_empty(batch, dtype=torch.int32),
        a.x.new_empty(batch, length, dtype=torch.int64),
        a.x.new_empty(batch, capacity, dtype=torch.float32),
    )


def _saved(a: Call, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    _, _, assignment, out_sizes = results
    return assignment, a.sizes, out_sizes


def _backward(a: Call, shape: torch.Size, grad: Tensor, saved: tuple[Tensor | None, ...]) -> Tensor:
    row, weight, _ = _linear(grad.shape[-1], saved)
    return grad.float().gather(1, row) * weight


def _forward(a: Call, tangent: Tensor, saved: tuple[Tensor | None, ...]) -> Tensor:
    row, weight, capacity = _linear(tangent.shape[-1], saved)
    out = tangent.new_zeros(tangent.shape[0], capacity, tangent.shape[-1], dtype=torch.float32)
    return out.scatter_add(1, row, tangent.float() * weight)


def _linear(channels: int, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, int]:
    """Row (B, P+N, C) of each token and d tokens[row] / d x (B, P+N, 1); the number of rows.

    The derivative is s_i / size of the merged token; exactly 1 if the token is not merged.
    """
    assignment, sizes, out_sizes = saved  # [B, P+N], [B, P+N], [B, P+N']
    assert assignment is not None
    assert out_sizes is not None
    merged_size = out_sizes.gather(1, assignment)
    own_size = torch.ones_like(merged_size) if sizes is None else sizes
    weight = torch.where(own_size == merged_size, 1.0, own_size / merged_size)
    return assignment[..., None].expand(-1, -1, channels), weight[..., None], out_sizes.shape[1]


define(
    spatial_merge, _check, _fake, gradient=Gradient(_saved, _backward, _forward), folds=lambda call: not call.uniform
)
