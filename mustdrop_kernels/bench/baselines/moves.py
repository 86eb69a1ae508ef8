# SPDX-License-Identifier: Apache-2.0
"""Baselines of the operators that move tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import PAGE_SIZE, Case, Inputs, Raw, canonical_compact, canonical_compact_paged, only
from .base import Baseline, compiled, for_case


@for_case
def _index_select(case: Case, inputs: Inputs) -> Raw:
    x, keep, _ = inputs.args
    return torch.stack([row.index_select(0, index) for row, index in zip(x, keep, strict=True)])


@for_case
def _gather(case: Case, inputs: Inputs) -> Raw:
    x, keep, _ = inputs.args
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))


def _cut(cache: Tensor, keep: Tensor) -> Tensor:
    if len(cache) == 1:
        return cache.index_select(2, keep[0])
    return torch.stack([row.index_select(1, index) for row, index in zip(cache, keep, strict=True)])


@for_case
def _select_layers(case: Case, inputs: Inputs) -> Raw:
    """New tensors, layer by layer; the old ones can be freed once the caller releases them."""
    keys, values, keep, _ = inputs.args
    return [_cut(cache, keep[0]) for cache in keys], [_cut(cache, keep[0]) for cache in values]


@for_case
def _copy_back(case: Case, inputs: Inputs) -> Raw:
    """Compaction in place, through a copy of the kept tokens."""
    keys, values, keep, _ = inputs.args
    kept = keep[0].shape[1]
    for cache in (*keys, *values):
        for row, index in zip(cache, keep[0], strict=True):
            row[:, :kept] = row.index_select(1, index)


@for_case
def _paged_copy(case: Case, inputs: Inputs) -> Raw:
    keys, values, table, keep, _ = inputs.args
    index = keep[0]
    position = torch.arange(index.shape[1], device=index.device).expand_as(index)
    pages = table.long()
    source = (pages.gather(1, index // PAGE_SIZE) * PAGE_SIZE + index % PAGE_SIZE).flatten()
    target = (pages.gather(1, position // PAGE_SIZE) * PAGE_SIZE + position % PAGE_SIZE).flatten()
    for cache in (*keys, *values):
        slots = cache.flatten(0, 1)  # a view
        slots.index_copy_(0, target, slots.index_select(0, source))


def _result_bytes(case: Case) -> int:
    return case.input_bytes * case.shape.kept // case.shape.length


SELECT = Baseline(
    "index_select", ("gather_tokens",), _index_select, "index_select of each sequence, and stack", only("tokens"),
    scratch=_result_bytes,
)  # fmt: skip
GATHER = Baseline(
    "torch.gather", ("gather_tokens",), _gather, "torch.gather of whole rows", only("tokens"), scratch=_result_bytes
)
LAYERS = Baseline(
    "index_select", ("compact_kv_",), _select_layers, "index_select of K and of V in each layer into new tensors",
    canonical_compact, scratch=_result_bytes,
)  # fmt: skip
COPY_BACK = Baseline(
    "index_select + copy back", ("compact_kv_",), _copy_back, "in place: index_select, then a copy into the cache",
    canonical_compact, scratch=_result_bytes, in_place=True,
)  # fmt: skip
PAGED = Baseline(
    "index_select + index_copy_", ("compact_paged_kv_",), _paged_copy,
    "in place: slots gathered by index_select and written by index_copy_, layer by layer",
    canonical_compact_paged, scratch=_result_bytes, in_place=True,
)  # fmt: skip
BASELINES = (SELECT, GATHER, compiled(GATHER), LAYERS, COPY_BACK, PAGED)
