# SPDX-License-Identifier: Apache-2.0
"""Operator calls that together launch every kernel, in every shipped configuration and specialization.

The shapes are those of the models that the tables are tuned for; contents do not matter, nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...ops.contract import CONTRACTS
from ...ops.samples import sample
from . import defined, implementation

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
FLOATS = (HALF, BRAIN, SINGLE)
Call = Callable[[], Any]


def _empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _gather(*shape: int, dtype: torch.dtype = HALF, align_end: bool = False) -> None:
    keep = _empty(shape[0], 200, dtype=torch.int64)
    implementation("gather_tokens")(_empty(*shape, dtype=dtype), keep, _ints(shape[0]), align_end=align_end)


def _gathers() -> Iterator[Call]:
    for dtype, align_end in product((HALF, BRAIN, SINGLE, torch.uint8, torch.int64), (False, True)):
        for shape in ((1, 671, 4096), (1, 671), (1, 671, 32), (2, 671, 100), (2, 671, 4, 72)):
            yield partial(_gather, *shape, dtype=dtype, align_end=align_end)


def _select(length: int, scores_dtype: torch.dtype, protect: bool, budgets: bool, drop_multiple: int) -> None:
    scores, types = _empty(2, length, dtype=scores_dtype), _bytes(2, length)
    options = {"protected": _empty(2, length, dtype=torch.bool) if protect else None, "drop_multiple": drop_multiple}
    implementation("select_dual")(scores, scores, types, 0.01, 0.01, **options)
    implementation("select_topk")(scores, types, 64, budgets=_ints(2) if budgets else None, **options)


def _selections() -> Iterator[Call]:
    for length, drop_multiple in product((200, 671, 2980, 18000), (1, 16)):
        yield partial(_select, length, SINGLE, False, False, drop_multiple)
        yield partial(_select, length, SINGLE, True, True, drop_multiple)
    for dtype in (HALF, BRAIN):
        yield partial(_select, 671, dtype, False, True, 1)


def _cache(shape: Sequence[int], dtype: torch.dtype, transposed: bool) -> Tensor:
    cache = _empty(*shape, dtype=dtype)
    return cache.transpose(-1, -2).contiguous().transpose(-1, -2) if transposed else cache


def _compact(layers: int, dim: int, dtype: torch.dtype, own: bool = False, **options: Any) -> None:
    """``own``: each layer and head has its own keep set."""
    caches = [_empty(1, 4, 32, dim, dtype=dtype) for _ in range(2 * layers)]
    sets, lead = (layers, (1, 4)) if own else (1, (1,))
    keep, counts = [_empty(*lead, 16, dtype=torch.int64) for _ in range(sets)], [_ints(*lead) for _ in range(sets)]
    implementation("compact_kv_")(caches[:layers], caches[layers:], keep, counts, **options)


def _compact_paged(page_size: int, dim: int, dtype: torch.dtype, transposed: bool = False, **options: Any) -> None:
    caches = [_cache((4, page_size, 4, dim), dtype, transposed) for _ in range(4)]
    table, ends, keep = _ints(1, 4), _ints(1), [_empty(1, 16, dtype=torch.int64)]
    implementation("compact_paged_kv_")(caches[:2], caches[2:], table, keep, [ends], seq_lens=ends, **options)


def _compactions() -> Iterator[Call]:
    for align_end in (False, True):
        for layers, dim, dtype in ((13, 128, BRAIN), (32, 128, HALF), (2, 64, SINGLE), (2, 1, SINGLE), (1, 80, HALF)):
            yield partial(_compact, layers, dim, dtype, align_end=align_end)
        yield partial(_compact, 28, 128, torch.uint8, align_end=align_end)
        yield partial(_compact, 4, 128, BRAIN, own=True, align_end=align_end)
        for page_size, dim, dtype in ((16, 128, BRAIN), (1, 128, HALF), (256, 64, torch.uint8)):
            yield partial(_compact_paged, page_size, dim, dtype, align_end=align_end)
    yield partial(_compact_paged, 32, 128, HALF, transposed=True)


def _cls(dim: int, dtype: torch.dtype, with_counts: bool) -> None:
    q, k = _empty(2, 16, dim, dtype=dtype), _empty(2, 16, 577, dim, dtype=dtype)
    implementation("cls_attention")(q, k, 0.125, counts=_ints(2) if with_counts else None)


def _merge(dtype: torch.dtype, grid: list[int], window: list[int], weighted: bool = False, **options: Any) -> None:
    length = 1 + prod(grid)
    sizes = _empty(2, length, dtype=SINGLE) if weighted else None
    implementation("spatial_merge")(_empty(2, length, 1024, dtype=dtype), grid, window, sizes=sizes, **options)


def _merges() -> Iterator[Call]:
    for dtype, weighted in product(FLOATS, (False, True)):
        yield partial(_merge, dtype, [24, 24], [3, 3], weighted)
        yield partial(_merge, dtype, [40, 40], [2, 2], weighted, budget=64)
    for first in (False, True):
        yield partial(_merge, HALF, [24, 24], [3, 3], uniform=True, merged_first=first)
        yield partial(_merge, HALF, [8, 24, 24], [1, 3, 3], merged_first=first)
        yield partial(_merge, HALF, [14, 14], [2, 2], budget=9, merged_first=first)


def _scores(heads: tuple[int, int], rows: int, length: int, dim: int, dtype: torch.dtype, with_lse: bool) -> None:
    q, k = _empty(1, heads[0], rows, dim, dtype=dtype), _empty(1, heads[1], length, dim, dtype=dtype)
    lse = _empty(1, heads[0], rows, dtype=SINGLE) if with_lse else None
    implementation("text_vision_scores")(q, k, _bytes(1, length), dim**-0.5, lse=lse)


def _packed_scores(dtype: torch.dtype, with_lse: bool) -> None:
    q, k, types = _empty(100, 28, 128, dtype=dtype), _empty(700, 4, 128, dtype=dtype), _bytes(700)
    ends, lse = _ints(2), _empty(28, 100, dtype=SINGLE) if with_lse else None
    implementation("text_vision_scores_varlen")(q, k, types, ends, ends, 100, 700, 0.1, lse=lse)
    cache, table = _empty(50, 16, 4, 128, dtype=dtype), _ints(1, 44)
    implementation("text_vision_scores_paged")(q, cache, table, ends[:1], types[None], ends, 100, 0.1, lse=lse)


def _map(dtype: torch.dtype, with_lse: bool) -> None:
    q, k = _empty(1, 32, 64, 128, dtype=dtype), _empty(1, 32, 671, 128, dtype=dtype)
    lse = _empty(1, 32, 64, dtype=SINGLE) if with_lse else None
    implementation("text_vision_attention")(q, k, _bytes(1, 671), 0.1, 64, lse=lse)


def _scorings() -> Iterator[Call]:
    for dtype, with_lse in product(FLOATS, (False, True)):
        yield partial(_scores, (32, 32), 60, 671, 128, dtype, with_lse)
        yield partial(_scores, (28, 4), 18000, 18000, 128, dtype, with_lse)
        yield partial(_packed_scores, dtype, with_lse)
        yield partial(_map, dtype, with_lse)
    for dim, dtype in product((64, 80, 96, 256), (HALF, SINGLE)):
        yield partial(_scores, (32, 8), 671, 671, dim, dtype, False)
    yield partial(_scores, (32, 32), 3000, 3000, 128, HALF, False)


def _samples() -> Iterator[Call]:
    for op in CONTRACTS:
        if defined(op):
            yield partial(implementation(op), **sample(op, dtype=HALF))


def calls() -> list[Call]:
    """Operator calls; ``crosscompile`` records what they launch."""
    attention = [partial(_cls, *form) for form in product((64, 80), FLOATS, (False, True))]
    return [*_samples(), *_gathers(), *_selections(), *_compactions(), *attention, *_merges(), *_scorings()]
