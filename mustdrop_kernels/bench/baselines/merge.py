# SPDX-License-Identifier: Apache-2.0
"""Baselines of spatial_merge."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Canonical, Case, Inputs, Raw
from .base import Baseline, Call, compiled


def _windows(x: Tensor, grid: list[int], window: list[int]) -> Tensor:
    """[B, N, C] -> [B, windows, n, C]."""
    batch, _, channels = x.shape
    (height, width), (h, w) = grid, window
    x = x.reshape(batch, height // h, h, width // w, w, channels).transpose(2, 3)
    return x.reshape(batch, -1, h * w, channels)


def _pairwise(windows: Tensor) -> Tensor:
    """Mean cosine of each window [B, windows], from the cosines of all n x n pairs."""
    n = windows.shape[2]
    cosine = F.cosine_similarity(windows[:, :, :, None], windows[:, :, None], dim=-1)  # [B, windows, n, n]
    return (cosine.sum((-1, -2)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def _linear(windows: Tensor) -> Tensor:
    """Similarity from the sum of the unit vectors."""
    n = windows.shape[2]
    unit = F.normalize(windows.float(), dim=-1, eps=1e-8)
    return ((unit.sum(2) ** 2).sum(-1) - (unit * unit).sum((-1, -2))) / (n * (n - 1))


def _merge(similarity: Tensor, windows: Tensor, x: Tensor, grid: list[int], window: list[int], threshold: float) -> Raw:
    """Every image merges as many windows as the one with the fewest, as the published code does: tokens, windows."""
    batch, count = similarity.shape
    patches, n, channels = x.shape[1] - 1, windows.shape[2], windows.shape[3]
    merged = int((similarity >= threshold).sum(-1).min())
    chosen = similarity.argsort(dim=-1, descending=True)[:, :merged]  # [B, r]
    means = windows.gather(1, chosen[..., None, None].expand(-1, -1, n, channels)).mean(2)
    goes = torch.zeros(batch, count, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
    (height, width), (h, w) = grid, window
    goes = goes.view(batch, height // h, 1, width // w, 1).expand(-1, -1, h, -1, w).reshape(batch, patches)
    alone = x[:, 1:][~goes].view(batch, patches - merged * n, channels)
    return torch.cat([x[:, :1], means, alone], 1), chosen


def _by(similarity: Callable[[Tensor], Tensor]) -> Callable[[Case], Call]:
    """Merging by a similarity of windows."""

    def call(inputs: Inputs) -> Raw:
        x, grid, window, threshold = inputs.args
        windows = _windows(x[:, 1:], grid, window)
        return _merge(similarity(windows), windows, x, grid, window, threshold)

    return lambda case: call


def _canonical(raw: Raw, inputs: Inputs) -> Canonical:
    tokens, chosen = raw
    batch, merged = chosen.shape
    order = chosen.argsort(-1)
    place = torch.arange(tokens.shape[1], device=tokens.device).repeat(batch, 1)
    place[:, 1 : 1 + merged] = 1 + order
    windows = (inputs.args[0].shape[1] - 1) // (inputs.args[2][0] * inputs.args[2][1])
    chose = torch.zeros(batch, windows, dtype=torch.bool, device=tokens.device).scatter_(1, chosen, True)
    rows = tokens.gather(1, place[..., None].expand_as(tokens))
    counts = torch.full((batch,), tokens.shape[1], device=tokens.device)
    return {"tokens": rows.flatten(0, 1), "merged": chose, "counts": counts}


def _pair_bytes(case: Case) -> int:
    shape = case.shape
    n = shape.window[0] * shape.window[1]
    return 3 * shape.batch * shape.images * shape.patches * n * shape.channels * case.dtype.itemsize


PUBLISHED = Baseline(
    "published", ("spatial_merge",), _by(_pairwise),
    "the cosine of all 81 pairs of each window; every image merges as many windows as the one with the fewest",
    _canonical, scratch=_pair_bytes,
)  # fmt: skip
LINEAR = Baseline(
    "linear formula", ("spatial_merge",), _by(_linear),
    "our formula, |sum of unit vectors| squared, in PyTorch operations",
    _canonical, scratch=lambda case: 4 * case.input_bytes,
)  # fmt: skip
BASELINES = (PUBLISHED, compiled(PUBLISHED), LINEAR, compiled(LINEAR))
