# SPDX-License-Identifier: Apache-2.0
"""What every operator asks of its arguments: one place for the fakes and the Python backends.

Each function takes an operator's arguments and raises a RuntimeError that names the operator, the argument, what it was
and what it must be. The C++ backends ask the same of theirs. Sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import overlap

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Checker:
    """Refuses arguments of one operator."""

    def __init__(self, op: str, like: Tensor) -> None:
        self.op, self.device = op, like.device

    def __call__(self, ok: bool, argument: str, message: str) -> None:
        """Refuse ``argument`` unless ``ok``."""
        torch._check(ok, lambda: f"mustdrop::{self.op}: {argument} {message}")

    def tensor(
        self,
        argument: str,
        t: Tensor,
        shape: Sequence[int | str],
        dtypes: Sequence[torch.dtype] | None = None,
        any_strides: bool = False,
    ) -> None:
        """Check layout, rank, known sizes (integers of ``shape``), dtype, device and the last dimension's stride."""
        self.strided(argument, t)
        text = "(" + ", ".join(map(str, shape)) + ")"
        self(t.dim() == len(shape), argument, f"must be {text}, got {tuple(t.shape)}")
        for i, size in enumerate(shape):
            if not isinstance(size, str):
                self(t.shape[i] == size, argument, f"must be {text}, got {tuple(t.shape)}")
        if dtypes is not None:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self(t.dtype in dtypes, argument, f"must be {names}, got {str(t.dtype).removeprefix('torch.')}")
        self(t.device == self.device, argument, f"must be on {self.device}, got {t.device}")
        if not any_strides and t.dim():
            self.last_contiguous(argument, t)

    def strided(self, argument: str, t: Tensor) -> None:
        """Refuse what has not its elements at strides, as they are: sparse and nested tensors, lazy conjugates."""
        self(isinstance(t, Tensor), argument, f"must be a Tensor, got {type(t).__name__}")
        kind = "quantized" if t.is_quantized else "nested" if t.is_nested else t.layout
        self(kind is torch.strided, argument, f"must be an ordinary strided tensor, got {kind}")
        self(not (t.is_conj() or t.is_neg()), argument, "must not be conjugated or negated lazily: resolve it first")

    def last_contiguous(self, argument: str, t: Tensor) -> None:
        """Refuse a tensor whose last dimension has gaps."""
        ok = t.stride(-1) == 1 or t.shape[-1] <= 1 or t.numel() == 0
        self(ok, argument, f"must be contiguous in its last dimension, got strides {t.stride()}")

    def at_least(self, argument: str, value: int, least: int) -> None:
        """Refuse an integer below ``least``."""
        self(value >= least, argument, f"must be at least {least}, got {value}")


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
) -> None:
    """Check the arguments of spatial_merge."""
    check = Checker("spatial_merge", x)
    check.tensor("x", x, ("B", "P+N", "C"), FLOATS)
    check(len(grid) in (2, 3), "grid", f"must be [H, W] or [T, H, W], got {list(grid)}")
    check(len(window) == len(grid), "window", f"must have as many entries as grid, got {list(window)}")
    for size, extent in zip(grid, window, strict=True):
        check(size >= 0, "grid", f"must not be negative, got {list(grid)}")
        check(extent >= 1, "window", f"must be positive, got {list(window)}")
    check.at_least("num_prefix_tokens", num_prefix_tokens, 0)
    length = num_prefix_tokens + prod(grid)
    given = f"num_prefix_tokens {num_prefix_tokens} and grid {list(grid)}"
    check(x.shape[1] == length, "x", f"must have num_prefix_tokens + prod(grid) tokens with {given}, got {x.shape[1]}")
    if sizes is not None:
        check.tensor("sizes", sizes, (x.shape[0], x.shape[1]), (torch.float32,))
    if budget is None:
        return
    check(not uniform, "uniform", "must not be set together with budget")
    for size, extent in zip(grid, window, strict=True):
        check(size % extent == 0, "window", f"must tile the grid {list(grid)} where budget is set, got {list(window)}")
    windows = prod(size // extent for size, extent in zip(grid, window, strict=True))
    check.at_least("budget", budget, 0)
    check(budget <= windows, "budget", f"must be at most the number of windows, {windows}, got {budget}")
    check(prod(window) > 1 or budget == 0, "budget", f"must be 0 with windows of one token, got {budget}")


def cls_attention(
    q: Tensor, k: Tensor, scale: float, *, counts: Tensor | None = None, num_prefix_tokens: int = 1
) -> None:
    """Check the arguments of cls_attention."""
    check = Checker("cls_attention", q)
    check.tensor("q", q, ("B", "H", "D"), FLOATS)
    check.tensor("k", k, (q.shape[0], q.shape[1], "S", q.shape[2]), (q.dtype,))
    if counts is not None:
        check.tensor("counts", counts, (q.shape[0],), (torch.int32,), any_strides=True)
    check.at_least("num_prefix_tokens", num_prefix_tokens, 0)


def _heads(check: Checker, argument: str, hq: int, hk: int) -> None:
    ok = hk > 0 and hq % hk == 0 if hq else True
    check(ok, argument, f"must have a number of heads that divides the query's {hq}, got {hk}")


def text_vision_scores(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    op: str = "text_vision_scores",
) -> None:
    """Check the arguments that all dense scoring operators share."""
    check = Checker(op, q)
    check.tensor("q", q, ("B", "Hq", "Lq", "D"), FLOATS)
    check.tensor("k", k, (q.shape[0], "Hk", "Lk", q.shape[3]), (q.dtype,))
    _heads(check, "k", q.shape[1], k.shape[1])
    check(q.shape[2] <= k.shape[2], "q", f"must not have more rows than k, {k.shape[2]}, got {q.shape[2]}")
    check.tensor("token_types", token_types, (q.shape[0], k.shape[2]), (torch.uint8,))
    if lse is not None:
        check.tensor("lse", lse, (q.shape[0], q.shape[1], q.shape[2]), (torch.float32,), any_strides=True)


def _packed_query(check: Checker, q: Tensor, cu_seqlens_q: Tensor, lse: Tensor | None) -> None:
    check.tensor("q", q, ("total_q", "Hq", "D"), FLOATS)
    check.tensor("cu_seqlens_q", cu_seqlens_q, ("B+1",), (torch.int32,))
    check.at_least("cu_seqlens_q", cu_seqlens_q.shape[0], 1)
    if lse is not None:
        check.tensor("lse", lse, (q.shape[1], q.shape[0]), (torch.float32,), any_strides=True)


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
) -> None:
    """Check the arguments of text_vision_scores_varlen."""
    check = Checker("text_vision_scores_varlen", q)
    _packed_query(check, q, cu_seqlens_q, lse)
    check.tensor("k", k, ("total_k", "Hk", q.shape[2]), (q.dtype,))
    _heads(check, "k", q.shape[1], k.shape[1])
    check.tensor("token_types", token_types, (k.shape[0],), (torch.uint8,))
    check.tensor("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), (torch.int32,))
    check.at_least("max_seqlen_q", max_seqlen_q, 0)
    check.at_least("max_seqlen_k", max_seqlen_k, 0)


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
) -> None:
    """Check the arguments of text_vision_scores_paged."""
    check = Checker("text_vision_scores_paged", q)
    _packed_query(check, q, cu_seqlens_q, lse)
    check.tensor("k_cache", k_cache, ("blocks", "slots", "Hk", q.shape[2]), (q.dtype,), any_strides=True)
    check.at_least("k_cache", k_cache.shape[1], 1)
    _heads(check, "k_cache", q.shape[1], k_cache.shape[2])
    batch = cu_seqlens_q.shape[0] - 1
    check.tensor("block_table", block_table, (batch, "max_blocks"), (torch.int32,))
    check.tensor("seq_lens", seq_lens, (batch,), (torch.int32,))
    check.tensor("token_types", token_types, (batch, "max_len"), (torch.uint8,))
    check.at_least("max_seqlen_q", max_seqlen_q, 0)


def text_vision_attention(
    q: Tensor, k: Tensor, token_types: Tensor, scale: float, max_query: int, *, lse: Tensor | None = None
) -> None:
    """Check the arguments of text_vision_attention."""
    text_vision_scores(q, k, token_types, scale, lse=lse, op="text_vision_attention")
    Checker("text_vision_attention", q).at_least("max_query", max_query, 0)


def _selection(
    check: Checker, token_types: Tensor, protected: Tensor | None, capacity: int | None, drop_multiple: int
) -> None:
    if protected is not None:
        check.tensor("protected", protected, tuple(token_types.shape), (torch.bool,))
    if capacity is not None:
        check.at_least("capacity", capacity, 0)
    check.at_least("drop_multiple", drop_multiple, 1)


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
) -> None:
    """Check the arguments of select_dual."""
    check = Checker("select_dual", total)
    check.tensor("total", total, ("B", "L"), FLOATS)
    check.tensor("peak", peak, tuple(total.shape), (total.dtype,))
    check.tensor("token_types", token_types, tuple(total.shape), (torch.uint8,))
    _selection(check, token_types, protected, capacity, drop_multiple)


def _topk(check: Checker, argument: str, k: int, budgets: Tensor | None, batch: int) -> None:
    check.at_least(argument, k, 0)
    if budgets is not None:
        check.tensor("budgets", budgets, (batch,), (torch.int32,), any_strides=True)


def select_topk(
    scores: Tensor,
    token_types: Tensor,
    k: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
) -> None:
    """Check the arguments of select_topk."""
    check = Checker("select_topk", scores)
    check.tensor("scores", scores, ("B", "L"), FLOATS)
    check.tensor("token_types", token_types, tuple(scores.shape), (torch.uint8,))
    _topk(check, "k", k, budgets, scores.shape[0])
    _selection(check, token_types, protected, capacity, drop_multiple)


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
) -> None:
    """Check the arguments of dual_attention_select."""
    text_vision_scores(q, k, token_types, scale, lse=lse, op="dual_attention_select")
    _selection(Checker("dual_attention_select", q), token_types, protected, capacity, drop_multiple)


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
) -> None:
    """Check the arguments of topk_attention_select."""
    text_vision_scores(q, k, token_types, scale, lse=lse, op="topk_attention_select")
    check = Checker("topk_attention_select", q)
    _topk(check, "budget", budget, budgets, q.shape[0])
    _selection(check, token_types, protected, capacity, drop_multiple)


def gather_tokens(x: Tensor, keep: Tensor, counts: Tensor, *, align_end: bool = False) -> None:
    """Check the arguments of gather_tokens."""
    check = Checker("gather_tokens", x)
    check.strided("x", x)
    check(x.dim() >= 2, "x", f"must be (B, L, ...), got {tuple(x.shape)}")
    if x.dim() > 2:
        check.last_contiguous("x", x)
    check.tensor("keep", keep, (x.shape[0], "K"), (torch.int64,))
    check.tensor("counts", counts, (x.shape[0],), (torch.int32,), any_strides=True)


def _keep_lists(
    check: Checker, layers: int, batch: int, heads: Sequence[int], keep: Sequence[Tensor], counts: Sequence[Tensor]
) -> None:
    """Check keep sets: one for all layers or one per layer, each (B, K) with (B) or (B, Hk, K) with (B, Hk)."""
    ok = len(keep) in (1, layers)
    check(ok, "keep", f"must hold one tensor or one per layer ({layers}), got {len(keep)}")
    check(len(counts) == len(keep), "counts", f"must hold as many tensors as keep ({len(keep)}), got {len(counts)}")
    for i, (indices, count) in enumerate(zip(keep, counts, strict=True)):
        served = heads if len(keep) == 1 else heads[i : i + 1]
        ok = indices.dim() in (2, 3)
        check(ok, f"keep[{i}]", f"must be (B, K) or (B, Hk, K), got {tuple(indices.shape)}")
        leading = (batch,) if indices.dim() == 2 else (batch, served[0])
        check.tensor(f"keep[{i}]", indices, (*leading, "K"), (torch.int64,))
        check.tensor(f"counts[{i}]", count, leading, (torch.int32,), any_strides=True)
        if indices.dim() == 3:
            same = all(h == served[0] for h in served)
            check(same, f"keep[{i}]", f"must be (B, K) where layers differ in heads, got {tuple(indices.shape)}")


def _caches(
    check: Checker,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    shape: Sequence[str],
    shared: int,
    any_strides: bool,
) -> None:
    """Check pairs of caches: 4-D, equal but for head_dim, every element at its own address, no tensor twice."""
    check(len(values) == len(keys), "values", f"must hold as many tensors as keys ({len(keys)}), got {len(values)}")
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        check.tensor(f"keys[{i}]", key, (*shape[:-1], "D"), any_strides=any_strides)
        check.tensor(f"values[{i}]", value, (*key.shape[:3], "D"), any_strides=any_strides)
        for d in range(shared):
            same = key.shape[d] == keys[0].shape[d]
            check(same, f"keys[{i}]", f"must agree with keys[0] in {shape[d]}, got {tuple(key.shape)}")
        for argument, t in ((f"keys[{i}]", key), (f"values[{i}]", value)):
            distinct = all(n <= 1 or s != 0 for n, s in zip(t.shape, t.stride(), strict=True)) or t.numel() == 0
            check(distinct, argument, f"must not be expanded (stride 0), got strides {t.stride()}")


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    align_end: bool = False,
) -> None:
    """Check the arguments of compact_kv_."""
    like = keys[0] if keys else (values[0] if values else torch.empty(0))
    check = Checker("compact_kv_", like)
    _caches(check, keys, values, ("B", "Hk", "L", "D"), 1, any_strides=False)
    if keys:
        _keep_lists(check, len(keys), keys[0].shape[0], [k.shape[1] for k in keys], keep, counts)
        _disjoint(check, keys, values, keep, counts)


def compact_paged_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    block_table: Tensor,
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    seq_lens: Tensor | None = None,
    align_end: bool = False,
) -> None:
    """Check the arguments of compact_paged_kv_."""
    check = Checker("compact_paged_kv_", block_table)
    _caches(check, keys, values, ("blocks", "slots", "Hk", "D"), 2, any_strides=True)
    check.tensor("block_table", block_table, ("B", "max_blocks"), (torch.int32,))
    batch = block_table.shape[0]
    check(seq_lens is not None or not align_end, "seq_lens", "must be given with align_end")
    if seq_lens is not None:
        check.tensor("seq_lens", seq_lens, (batch,), (torch.int32,), any_strides=True)
    if keys:
        check.at_least("keys[0]", keys[0].shape[1], 1)
        _keep_lists(check, len(keys), batch, [k.shape[2] for k in keys], keep, counts)
        _disjoint(check, keys, values, keep, counts, block_table, seq_lens)


def _disjoint(
    check: Checker,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
) -> None:
    """Refuse caches that share memory, with one another or with what says where things go.

    Tensors without an address (symbolic ones) are left to the kernel.
    """
    claims = [(f"keys[{i}]", t, True) for i, t in enumerate(keys)]
    claims += [(f"values[{i}]", t, True) for i, t in enumerate(values)]
    if block_table is not None:
        claims.append(("block_table", block_table, False))
    claims += [(f"keep[{i}]", t, False) for i, t in enumerate(keep)]
    claims += [(f"counts[{i}]", t, False) for i, t in enumerate(counts)]
    if seq_lens is not None:
        claims.append(("seq_lens", seq_lens, False))
    if all(overlap.has_address(t) for _, t, _ in claims):
        for argument, wrong in overlap.conflicts(claims):
            check(False, argument, wrong)
