# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every operator's results, for torch.compile and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from . import checks
from ._namespace import NAMESPACE
from .backends import OPS


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, P+N, C) without budget, (B, P+N-r(n-1), C) with it."""
    checks.spatial_merge(
        x, grid, window, threshold, budget=budget, uniform=uniform, num_prefix_tokens=num_prefix_tokens, sizes=sizes
    )
    batch, length, channels = x.shape
    capacity = length if budget is None else length - budget * (prod(window) - 1)
    return (
        x.new_empty(batch, capacity, channels),
        x.new_empty(batch, dtype=torch.int32),
        x.new_empty(batch, length, dtype=torch.int64),
        x.new_empty(batch, capacity, dtype=torch.float32),
    )


def cls_attention(
    q: Tensor, k: Tensor, scale: float, *, counts: Tensor | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    """(B, S) float32."""
    checks.cls_attention(q, k, scale, counts=counts, num_prefix_tokens=num_prefix_tokens)
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def _scores_like(token_types: Tensor) -> tuple[Tensor, Tensor]:
    shape = tuple(token_types.shape)
    return token_types.new_empty(shape, dtype=torch.float32), token_types.new_empty(shape, dtype=torch.float32)


def text_vision_scores(
    q: Tensor, k: Tensor, token_types: Tensor, scale: float, *, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two of (B, Lk) float32."""
    checks.text_vision_scores(q, k, token_types, scale, lse=lse)
    return _scores_like(token_types)


def text_vision_scores_varlen(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    *,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two of (total_k) float32."""
    checks.text_vision_scores_varlen(
        q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, lse=lse
    )
    return _scores_like(token_types)


def text_vision_scores_paged(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    token_types: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    *,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two of (B, max_len) float32."""
    checks.text_vision_scores_paged(
        q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, scale, lse=lse
    )
    return _scores_like(token_types)


def text_vision_attention(
    q: Tensor, k: Tensor, token_types: Tensor, scale: float, max_query: int, *, lse: Tensor | None = None
) -> Tensor:
    """(B, max_query, Lk) float32."""
    checks.text_vision_attention(q, k, token_types, scale, max_query, lse=lse)
    return q.new_empty(q.shape[0], max_query, k.shape[2], dtype=torch.float32)


def _selection_like(token_types: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    batch, length = token_types.shape
    keep = token_types.new_empty(batch, length if capacity is None else capacity, dtype=torch.int64)
    return keep, token_types.new_empty(batch, dtype=torch.int32)


def select_dual(
    total: Tensor,
    peak: Tensor,
    token_types: Tensor,
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """(B, L or capacity) int64 and (B) int32."""
    checks.select_dual(
        total, peak, token_types, global_threshold, individual_threshold,
        protected=protected, capacity=capacity, drop_multiple=drop_multiple,
    )  # fmt: skip
    return _selection_like(token_types, capacity)


def select_topk(
    scores: Tensor,
    token_types: Tensor,
    k: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """(B, L or capacity) int64 and (B) int32."""
    checks.select_topk(
        scores, token_types, k, budgets=budgets, protected=protected, capacity=capacity, drop_multiple=drop_multiple
    )
    return _selection_like(token_types, capacity)


def dual_attention_select(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    global_threshold: float,
    individual_threshold: float,
    *,
    protected: Tensor | None = None,
    lse: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A selection and the scores that it was made of."""
    checks.dual_attention_select(
        q, k, token_types, scale, global_threshold, individual_threshold,
        protected=protected, lse=lse, capacity=capacity, drop_multiple=drop_multiple,
    )  # fmt: skip
    return (*_selection_like(token_types, capacity), *_scores_like(token_types))


def topk_attention_select(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    budget: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    lse: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A selection and the scores that it was made of."""
    checks.topk_attention_select(
        q, k, token_types, scale, budget,
        budgets=budgets, protected=protected, lse=lse, capacity=capacity, drop_multiple=drop_multiple,
    )  # fmt: skip
    return (*_selection_like(token_types, capacity), *_scores_like(token_types))


def gather_tokens(x: Tensor, keep: Tensor, counts: Tensor, *, align_end: bool = False) -> Tensor:
    """(B, K, ...) of x's dtype."""
    checks.gather_tokens(x, keep, counts, align_end=align_end)
    return x.new_empty(keep.shape[0], keep.shape[1], *x.shape[2:])


compact_kv_: Callable[..., None] = checks.compact_kv_  # works in place: there is no result to describe
compact_paged_kv_: Callable[..., None] = checks.compact_paged_kv_


def register() -> None:
    """Register the fakes with torch. Called once, at import."""
    for op in OPS:
        torch.library.register_fake(f"{NAMESPACE}::{op}", globals()[op])
