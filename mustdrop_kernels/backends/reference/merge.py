# SPDX-License-Identifier: Apache-2.0
"""Windowed similarity merging."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import rank_descending

VANISHED = 2.0**-63  # norm below which a token counts as zero: in float32 its square has lost bits


def window_members(grid: Sequence[int], window: Sequence[int], device: torch.device) -> Tensor:
    """(windows, prod(window)): the patches of each window in raster order, -1 where the border cuts it."""
    index = torch.arange(prod(grid), device=device).view(*grid)
    missing = [-size % extent for size, extent in zip(grid, window, strict=True)]
    padding = [p for m in reversed(missing) for p in (0, m)]
    index = F.pad(index, padding, value=-1)
    # [H, W] -> [H/h, h, W/w, w] -> [H/h, W/w, h, w]
    split = [s for size, extent in zip(index.shape, window, strict=True) for s in (size // extent, extent)]
    axes = [*range(0, 2 * len(window), 2), *range(1, 2 * len(window), 2)]
    return index.view(split).permute(axes).reshape(-1, prod(window))


def window_similarity(x: Tensor, members: Tensor) -> Tensor:
    """(B, windows) float32: mean cosine over ordered pairs; NaN for windows of one token, which have no pair.

    Computed in float64: torch's order of summation depends on the memory layout, and equal windows must tie.
    """
    present = members >= 0  # [windows, n]
    norm = x.double().norm(dim=-1, keepdim=True)
    u = x.double() / norm.clamp(min=1e-8)  # [B, N, C]
    u = u.masked_fill(norm < VANISHED, 0.0)
    u = torch.where(present[..., None], u[:, members.clamp(min=0)], 0.0)  # [B, windows, n, C]
    n = present.sum(-1)
    squares = (u * u).sum((-1, -2))
    return (((u.sum(-2) ** 2).sum(-1) - squares) / (n * (n - 1))).float()


def spatial_merge(
    x: Tensor,  # [B, P+N, C]
    grid: Sequence[int],
    window: Sequence[int],
    threshold: float = 0.8,
    *,
    budget: int | None = None,
    uniform: bool = False,
    num_prefix_tokens: int = 1,
    sizes: Tensor | None = None,  # [B, P+N]
    merged_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``mustdrop_kernels.spatial_merge``."""
    batch, length, channels = x.shape
    prefix, patches = num_prefix_tokens, length - num_prefix_tokens
    # Positions that the border cuts off in every window need no memory; such windows are never complete.
    inside_grid = [min(extent, max(size, 1)) for size, extent in zip(grid, window, strict=True)]
    members = window_members(grid, inside_grid, x.device)  # [W, n]
    present = members >= 0
    mergeable = present.sum(-1) > 1  # [W]
    similarity = window_similarity(x[:, prefix:], members)  # [B, W]

    complete = present.all(-1) & mergeable & (inside_grid == list(window))
    if budget is not None:
        merged = rank_descending(similarity, complete.expand_as(similarity)) < budget
    else:
        merged = (similarity >= torch.tensor(threshold, dtype=torch.float32, device="cpu").item()) & mergeable
        if uniform:
            merged = merged & complete
            fewest = merged.sum(-1).amin() if batch else 0
            merged = rank_descending(similarity, complete.expand_as(similarity)) < fewest
    rank = rank_descending(similarity, merged)  # [B, W]: by falling similarity among the merged

    # The window of each patch, whether that window merges, and the patch that represents it.
    window_of = members.new_zeros(patches + 1).scatter(
        0,
        torch.where(present, members, patches).flatten(),
        torch.arange(len(members), device=x.device).repeat_interleave(members.shape[1]),
    )[:patches]
    goes = merged[:, window_of]  # [B, N]
    patch = torch.arange(patches, device=x.device)
    head = torch.where(goes, members[:, 0][window_of], patch)  # [B, N]
    stands = head == patch  # [B, N]

    if merged_first:
        alone = prefix + merged.sum(-1, keepdim=True) + (~goes).cumsum(-1) - 1
        row = torch.where(goes, prefix + rank[:, window_of], alone)
    else:
        row = (prefix + stands.cumsum(-1) - 1).gather(1, head)
    assignment = torch.cat([torch.arange(prefix, device=x.device).expand(batch, -1), row], 1)

    capacity = length if budget is None else length - budget * (prod(window) - 1)
    weight = torch.ones(batch, length, dtype=torch.float32, device=x.device) if sizes is None else sizes
    # One extra row collects the tokens that are not written.
    tokens = x.new_zeros(batch, capacity + 1, channels)
    out_sizes = weight.new_zeros(batch, capacity + 1)
    single = torch.cat([goes.new_ones(batch, prefix), ~goes], 1)  # [B, P+N]
    target = torch.where(single, assignment, capacity)
    tokens.scatter_(1, target[..., None].expand(-1, -1, channels), x)
    out_sizes.scatter_(1, target, weight)

    inside = members.clamp(min=0) + prefix
    member_weight = weight[:, inside] * present  # [B, W, n]
    member = torch.where(present[..., None], x[:, inside].double(), 0.0)  # sums may leave float32, means do not
    total = member_weight.sum(-1)  # [B, W]
    mean = (member_weight[..., None] * member).sum(-2) / total[..., None]
    target = torch.where(merged, assignment[:, prefix + members[:, 0]], capacity)  # [B, W]
    tokens.scatter_(1, target[..., None].expand(-1, -1, channels), mean.to(x.dtype))
    out_sizes.scatter_(1, target, total)
    # The prefix, every unmerged token and every merged window.
    counts = prefix + stands.sum(-1)
    beyond = torch.arange(capacity, device=x.device) >= counts[:, None]
    tokens = tokens[:, :capacity].masked_fill(beyond[..., None], 0.0)
    return tokens, counts.int(), assignment, out_sizes[:, :capacity].masked_fill(beyond, 0.0)
