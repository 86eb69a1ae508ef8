# SPDX-License-Identifier: Apache-2.0
"""Baselines of the selections, alone and behind the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops import TokenType
from ..cases import Canonical, Case, Inputs, Raw
from ..shapes import Shape
from .base import Baseline, Call, compiled, for_case
from .scores import MATRIX, PUBLISHED, ROWS, matrix_bytes, rows_bytes

# Positions in the sequence that pass the thresholds or the budget: (total, peak, b) -> [kept vision]
Chosen = Callable[[Tensor, Tensor, int], Tensor]


def _text(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the text before and after the image."""
    position = torch.arange(shape.length, device=device)
    return position[: shape.text_before], position[-shape.queries :]


def _vision(shape: Shape, score: Tensor, b: int) -> Tensor:
    return score[b, shape.text_before : shape.text_before + shape.vision]


def filter_tokens(total: Tensor, peak: Tensor, shape: Shape, limits: tuple[float, float]) -> list[Tensor]:
    """Positions of the vision tokens of each sequence that one of the thresholds keeps."""
    kept = []
    for b in range(shape.batch):
        total_b, peak_b = _vision(shape, total, b), _vision(shape, peak, b)
        dropped = (total_b < limits[0] * total_b.sum()) & (peak_b < limits[1])
        kept.append(torch.nonzero(~dropped)[:, 0] + shape.text_before)
    return kept


def best_tokens(total: Tensor, shape: Shape, k: int) -> list[Tensor]:
    """Positions of the k best vision tokens of each sequence."""
    return [_vision(shape, total, b).topk(k).indices + shape.text_before for b in range(shape.batch)]


def _union(shape: Shape, kept: list[Tensor], keys: list[Tensor] | None = None) -> list[Tensor]:
    """All text and the kept tokens, united with the key tokens and in order, by torch.unique."""
    before, after = _text(shape, kept[0].device)
    sets = [[before, row, after] for row in kept]
    if keys is not None:
        sets = [[*parts, row] for parts, row in zip(sets, keys, strict=True)]
    return [torch.unique(torch.cat(parts), sorted=True) for parts in sets]


def _sorted(shape: Shape, kept: list[Tensor]) -> list[Tensor]:
    before, after = _text(shape, kept[0].device)
    return [torch.cat([before, row.sort().values, after]) for row in kept]


@for_case
def _published_dual(case: Case, inputs: Inputs) -> Raw:
    shape = case.shape
    total, peak, _, *limits = inputs.args
    keys = [torch.nonzero(row)[:, 0] for row in inputs.kwargs["protected"]]
    return _union(shape, filter_tokens(total, peak, shape, (limits[0], limits[1])), keys)


@for_case
def _mask_dual(case: Case, inputs: Inputs) -> Raw:
    """One mask instead of a union of sets; its positions are listed once."""
    total, peak, types, global_threshold, individual_threshold = inputs.args
    limit = global_threshold * total.sum(-1, keepdim=True)
    low = (total < limit) & (peak < individual_threshold)
    dropped = low & (types == TokenType.VISION) & ~inputs.kwargs["protected"]
    return [torch.nonzero(row)[:, 0] for row in ~dropped & (types != TokenType.PADDING)]


def _topk(unite: bool) -> Callable[[Case], Call]:
    def compute(case: Case, inputs: Inputs) -> Raw:
        scores, _, k = inputs.args
        kept = best_tokens(scores, case.shape, k)
        return _union(case.shape, [row.sort().values for row in kept]) if unite else _sorted(case.shape, kept)

    return for_case(compute)


def _behind(scores: Baseline, dual: bool) -> Callable[[Case], Call]:
    """Scores and then a selection."""

    def build(case: Case) -> Call:
        shape, score = case.shape, scores.build(case)

        def call(inputs: Inputs) -> Raw:
            total, peak = score(inputs)
            if dual:
                limits = (inputs.args[4], inputs.args[5])
                return _union(shape, filter_tokens(total, peak, shape, limits)), total, peak
            return _union(shape, [row.sort().values for row in best_tokens(total, shape, inputs.args[4])]), total, peak

        return call

    return build


def _positions(raw: Raw, inputs: Inputs) -> Canonical:
    return {"keep": torch.cat(raw), "counts": torch.tensor([len(row) for row in raw], device=raw[0].device)}


def _scored(raw: Raw, inputs: Inputs) -> Canonical:
    return {**_positions(raw[0], inputs), "total": raw[1], "peak": raw[2]}


def _fused(scores: Baseline, dual: bool) -> Baseline:
    op = "dual_attention_select" if dual else "topk_attention_select"
    after = "nonzero and torch.unique" if dual else "torch.topk, sort and torch.unique"
    return Baseline(
        scores.name, (op,), _behind(scores, dual), f"{scores.what}; then {after}", _scored,
        scratch=rows_bytes if scores is ROWS else matrix_bytes,
    )  # fmt: skip


DUAL = Baseline(
    "published", ("select_dual",), _published_dual,
    "thresholds, nonzero, the key set joined by cat and torch.unique, sequence by sequence", _positions,
)  # fmt: skip
MASK = Baseline(
    "mask + nonzero", ("select_dual",), _mask_dual, "one mask for all, nonzero of each sequence", _positions
)
TOPK = Baseline("topk + sort", ("select_topk",), _topk(unite=False), "torch.topk, sort, cat with the text", _positions)
TOPK_UNIQUE = Baseline(
    "topk + sort + unique", ("select_topk",), _topk(unite=True),
    "torch.topk, sort, the text joined by cat and torch.unique", _positions,
)  # fmt: skip

_FUSED = tuple(_fused(scores, dual) for dual in (True, False) for scores in (PUBLISHED, MATRIX, ROWS))
BASELINES = (
    DUAL, MASK, compiled(MASK), TOPK_UNIQUE, TOPK, compiled(TOPK), *_FUSED,
    *(compiled(baseline) for baseline in _FUSED if baseline.name == ROWS.name),
)  # fmt: skip
