# SPDX-License-Identifier: Apache-2.0
"""The operators as documented Python functions.

Each is ``torch.ops.mustdrop.<name>`` with named results and a ``backend`` keyword (see ``mustdrop_kernels.backends``).
What holds for all of them:

- No host synchronisation and no size that depends on data: a result whose length depends on data has the capacity that
  is known from shapes, and an int32 ``counts`` tensor says how much of it is real.
- float32, float16, bfloat16; sums in float32, rounded once. ``gather_tokens`` and the compactions move any dtype.
- Any strides, as long as the last dimension is contiguous.
- The same input gives the same bits. Ties go to the lower index. NaN ranks lowest.
- Wrong arguments raise a RuntimeError that names the argument, before anything is done.

The method is MustDrop, "Multi-Stage Vision Token Dropping" (arXiv 2411.10803).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from . import _load, autograd, backends
from ._namespace import operator


class TokenType(IntEnum):
    """What a position of a sequence is (``token_types``, uint8)."""

    PADDING = 0
    TEXT = 1
    VISION = 2
    QUERY = 3
    """Text whose attention decides which vision tokens matter."""


class SpatialMerge(NamedTuple):
    """Result of ``spatial_merge``."""

    tokens: Tensor  # (B, P+N', C)
    counts: Tensor  # (B) int32, prefix included
    assignment: Tensor  # (B, P+N) int64: where each input token went
    sizes: Tensor  # (B, P+N') float32: how much each token stands for


class Scores(NamedTuple):
    """How much the text looks at each vision token; float32, zero at other tokens."""

    total: Tensor  # sum over query rows of the head mean
    peak: Tensor  # maximum over query rows of the head mean


class Selection(NamedTuple):
    """Which tokens stay."""

    keep: Tensor  # (B, L or capacity) int64, ascending, -1 past counts
    counts: Tensor  # (B) int32


class ScoredSelection(NamedTuple):
    """A selection together with the scores that it was made of."""

    keep: Tensor
    counts: Tensor
    total: Tensor
    peak: Tensor


def _call(op: str, backend: str | None, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(tensor, Tensor):
        _refuse_type(op, tensor, args)
    implementation = backends.explicit(op, tensor.device.type, backend)
    if implementation is None:
        if not _load.core.loaded:
            raise RuntimeError(f"mustdrop_kernels has no operators here: {_load.core.problem}")
        return operator(op)(*args, **kwargs)
    if autograd.needs_gradient(args, kwargs):
        return autograd.apply(op, implementation, args, kwargs)
    return implementation(*args, **kwargs)


def _refuse_type(op: str, given: object, args: tuple[Any, ...]) -> NoReturn:
    """What says where an operator runs is no tensor."""
    names = [argument.name for argument in operator(op).default._schema.arguments]
    name = next(
        f"{name}[0]" if isinstance(arg, list) else name
        for name, arg in zip(names, args, strict=False)
        if arg is given or (isinstance(arg, list) and arg and arg[0] is given)
    )
    raise TypeError(f"mustdrop::{op}: {name} must be a Tensor, got {type(given).__name__}")


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
    """Merge windows of similar neighbours into their weighted mean (MustDrop, stage 1).

    A window of n tokens merges iff the mean of cos(x_i, x_j) over its ordered pairs i != j reaches ``threshold``. With
    u = x / max(|x|, 1e-8) that mean is (|sum u|^2 - sum |u|^2) / (n (n-1)): linear in n, not quadratic.

    Args:
        x: (B, P+N, C) float. P prefix tokens (CLS, registers), then N = prod(grid) patches in row-major order.
        grid: [H, W], or [T, H, W] for video.
        window: as many entries. Windows tile the grid from its origin; those that the border cuts are smaller.
        threshold: least similarity of a window that merges.
        budget: merge exactly this many windows of each image, the most similar ones; ``threshold`` is not used. The
            windows must tile the grid. The result then has the static length P + N - budget * (n - 1).
        uniform: every image of the batch merges as many windows as the image with the fewest similar ones. Windows that
            the border cuts do not merge then.
        num_prefix_tokens: P.
        sizes: (B, P+N) float32, how much each token stands for already; default ones.
        merged_first: order the result as prefix, merged windows by falling similarity, the rest in raster order (as the
            published code does). Default: a merged window stands where its first token stood.
        backend: who computes it; default: whoever serves torch.ops.mustdrop on this device.

    Returns:
        tokens (B, P+N, C), zero past counts; counts (B) int32, prefix included; assignment (B, P+N) int64, the row that
        each input token went into; sizes (B, P+N) float32, zero past counts. Differentiable in ``x``.
    """
    kwargs = {
        "budget": budget,
        "uniform": uniform,
        "num_prefix_tokens": num_prefix_tokens,
        "sizes": sizes,
        "merged_first": merged_first,
    }
    return SpatialMerge(*_call("spatial_merge", backend, x, (x, list(grid), list(window), threshold), kwargs))


def cls_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    counts: Tensor | None = None,
    num_prefix_tokens: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Head mean of the CLS row of the attention map, without building the map (MustDrop, the key set).

    Args:
        q: (B, H, D) float, the CLS query.
        k: (B, H, S, D), keys of prefix and patches.
        scale: factor of the scores, usually 1 / sqrt(D).
        counts: (B) int32, how many of the S keys are real; default all.
        num_prefix_tokens: these take part in the softmax, and are zero in the result.
        backend: who computes it.

    Returns:
        (B, S) float32, zero for prefix and padding.
    """
    kwargs = {"counts": counts, "num_prefix_tokens": num_prefix_tokens}
    return _call("cls_attention", backend, q, (q, k, scale), kwargs)


def text_vision_scores(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Scores:
    """Sum and maximum over query rows of the head mean attention on each vision token (MustDrop, stage 2).

    P[h, t, j] = softmax over j <= t with type != 0 of scale * q[h, t] . k[h, j];
    total[j] = sum over t of mean over h of P[h, t, j]; peak[j] = max over t of mean over h of P[h, t, j];
    t runs over the rows whose type is QUERY.

    Args:
        q: (B, Hq, Lq, D) float, after RoPE. Row i stands at position Lk - Lq + i, so a part of the rows can be scored
            by itself: totals add, peaks take the maximum.
        k: (B, Hk, Lk, D), after RoPE; Hq a multiple of Hk, Lq <= Lk.
        token_types: (B, Lk) uint8, see ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        lse: (B, Hq, Lq) float32, natural logarithm of the sum of exponentials of the scaled scores under this mask, any
            strides, where the attention kernel has made it already.
        backend: who computes it.

    Returns:
        total and peak, (B, Lk) float32, zero where the type is not VISION.
    """
    return Scores(*_call("text_vision_scores", backend, q, (q, k, token_types, scale), {"lse": lse}))


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
    backend: str | None = None,
) -> Scores:
    """``text_vision_scores`` of a packed batch.

    Args:
        q: (total_q, Hq, D) float.
        k: (total_k, Hk, D).
        token_types: (total_k) uint8.
        cu_seqlens_q: (B+1) int32, where each sequence's rows begin in q; the last entry is where the last one ends.
        cu_seqlens_k: (B+1) int32, the same for k. Row i of a sequence stands at its position length_k - length_q + i.
        max_seqlen_q: upper bound of the lengths in q.
        max_seqlen_k: upper bound of the lengths in k.
        scale: factor of the scores.
        lse: (Hq, total_q) float32, natural logarithm.
        backend: who computes it.

    Returns:
        total and peak, (total_k) float32.
    """
    args = (q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    return Scores(*_call("text_vision_scores_varlen", backend, q, args, {"lse": lse}))


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
    backend: str | None = None,
) -> Scores:
    """``text_vision_scores`` with the keys in a paged cache.

    Args:
        q: (total_q, Hq, D) float.
        k_cache: (blocks, slots, Hk, D), any strides. Position p of sequence b is in block
            ``block_table[b, p // slots]`` at slot ``p % slots``.
        block_table: (B, max_blocks) int32.
        seq_lens: (B) int32, lengths of the sequences in the cache.
        token_types: (B, max_len) uint8.
        cu_seqlens_q: (B+1) int32. Row i of sequence b stands at position seq_lens[b] - length_q[b] + i.
        max_seqlen_q: upper bound of the lengths in q.
        scale: factor of the scores.
        lse: (Hq, total_q) float32, natural logarithm.
        backend: who computes it.

    Returns:
        total and peak, (B, max_len) float32.
    """
    args = (q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, scale)
    return Scores(*_call("text_vision_scores_paged", backend, q, args, {"lse": lse}))


def text_vision_attention(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    max_query: int,
    *,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The head mean map itself, whose sum and maximum over rows are ``text_vision_scores``.

    For pictures, and for tensor parallelism, where each rank holds some heads: average the maps over the ranks, then
    sum and take the maximum.

    Args:
        q: (B, Hq, Lq, D) float, the last Lq positions of each sequence.
        k: (B, Hk, Lk, D), of q's dtype.
        token_types: (B, Lk) uint8.
        scale: factor of the scores.
        max_query: number of rows of the result; query rows past it are left out.
        lse: (B, Hq, Lq) float32, natural logarithm.
        backend: who computes it.

    Returns:
        (B, max_query, Lk) float32: query rows in order, rows that are not there zero, columns that are not VISION zero.
    """
    args = (q, k, token_types, scale, max_query)
    return _call("text_vision_attention", backend, q, args, {"lse": lse})


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
    backend: str | None = None,
) -> Selection:
    """Drop vision token j iff total[j] < global_threshold * sum(total) and peak[j] < individual_threshold.

    Text stays, padding goes, protected vision tokens stay.

    Args:
        total: (B, L) float, see ``text_vision_scores``.
        peak: (B, L), of total's dtype.
        token_types: (B, L) uint8.
        global_threshold: share of the whole attention on vision, rounded to float32.
        individual_threshold: attention of one row, rounded to float32.
        protected: (B, L) bool, vision tokens that are never dropped.
        capacity: length of ``keep``; default L. Where counts exceed it, the first ``capacity`` are in ``keep``.
        drop_multiple: keep the best (by total) of the tokens that would go until the number that goes is a multiple of
            this: for paged caches, whole blocks.
        backend: who computes it.

    Returns:
        keep (B, L or capacity) int64, ascending, -1 past counts; counts (B) int32.
    """
    args = (total, peak, token_types, global_threshold, individual_threshold)
    kwargs = {"protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*_call("select_dual", backend, total, args, kwargs))


def select_topk(
    scores: Tensor,
    token_types: Tensor,
    k: int,
    *,
    budgets: Tensor | None = None,
    protected: Tensor | None = None,
    capacity: int | None = None,
    drop_multiple: int = 1,
    backend: str | None = None,
) -> Selection:
    """Keep k vision tokens: the protected first, then those with the highest scores.

    All protected vision tokens stay, also where they exceed k. Text stays, padding goes.

    Args:
        scores: (B, L) float.
        token_types: (B, L) uint8.
        k: vision tokens to keep per sequence.
        budgets: (B) int32, replaces k per sequence without a synchronisation.
        protected: (B, L) bool.
        capacity: length of ``keep``; default L.
        drop_multiple: keep the best of the tokens that would go until the number that goes is a multiple of this.
        backend: who computes it.

    Returns:
        keep (B, L or capacity) int64, ascending, -1 past counts; counts (B) int32.
    """
    kwargs = {"budgets": budgets, "protected": protected, "capacity": capacity, "drop_multiple": drop_multiple}
    return Selection(*_call("select_topk", backend, scores, (scores, token_types, k), kwargs))


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
    backend: str | None = None,
) -> ScoredSelection:
    """``text_vision_scores`` and ``select_dual`` in one; arguments and results are theirs."""
    args = (q, k, token_types, scale, global_threshold, individual_threshold)
    kwargs = {"protected": protected, "lse": lse, "capacity": capacity, "drop_multiple": drop_multiple}
    return ScoredSelection(*_call("dual_attention_select", backend, q, args, kwargs))


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
    backend: str | None = None,
) -> ScoredSelection:
    """``text_vision_scores`` and ``select_topk`` by its total in one; ``budget`` is select_topk's k."""
    kwargs = {
        "budgets": budgets,
        "protected": protected,
        "lse": lse,
        "capacity": capacity,
        "drop_multiple": drop_multiple,
    }
    args = (q, k, token_types, scale, budget)
    return ScoredSelection(*_call("topk_attention_select", backend, q, args, kwargs))


def gather_tokens(
    x: Tensor, keep: Tensor, counts: Tensor, *, align_end: bool = False, backend: str | None = None
) -> Tensor:
    """Take the kept tokens of hidden states, position ids, masks or token types.

    Args:
        x: (B, L, ...) of any dtype.
        keep: (B, K) int64. An index outside the sequence gives zeros.
        counts: (B) int32; min(counts, K) entries are used.
        align_end: put the tokens last instead of first (left padding).
        backend: who computes it.

    Returns:
        (B, K, ...), zero where there is no token. Differentiable in ``x``.
    """
    return _call("gather_tokens", backend, x, (x, keep, counts), {"align_end": align_end})


def compact_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    align_end: bool = False,
    backend: str | None = None,
) -> None:
    """Move the kept slots of the KV caches of all layers to the front, in place (MustDrop, stage 3).

    Slot i < counts takes what slot keep[i] held; slots past counts are unspecified. No second cache is made.

    Args:
        keys: per layer (B, Hk, L, D) of any dtype; L may differ between layers. A cache (B, L, Hk, D) is a view.
        values: per layer, like its key but for D.
        keep: one tensor for all layers or one per layer: (B, K) int64, or (B, Hk, K) for sets per head; ascending.
            A move from outside the sequence is skipped.
        counts: as many tensors: (B) or (B, Hk) int32.
        align_end: move to the last slots, L - counts .. L - 1, instead.
        backend: who does it.
    """
    args = (list(keys), list(values), list(keep), list(counts))
    if args[0]:
        _call("compact_kv_", backend, args[0][0], args, {"align_end": align_end})


def compact_paged_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    block_table: Tensor,
    keep: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    seq_lens: Tensor | None = None,
    align_end: bool = False,
    backend: str | None = None,
) -> None:
    """``compact_kv_`` of paged caches: blocks past ceil(counts / slots) are free afterwards.

    Args:
        keys: per layer (blocks, slots, Hk, D) of any dtype and any strides. Slot p of sequence b is in block
            ``block_table[b, p // slots]`` at ``p % slots``. The layouts of engines are views: NHD, HND, a token pool
            (slots = 1).
        values: per layer, like its key but for D.
        block_table: (B, max_blocks) int32. Blocks that other sequences share must not be listed.
        keep: as in ``compact_kv_``; positions in the sequence.
        counts: as in ``compact_kv_``.
        seq_lens: (B) int32, needed with ``align_end``.
        align_end: move the tokens to the last slots of the sequence, seq_lens - counts .. seq_lens - 1. Where the
            number of dropped tokens d is a multiple of ``slots``, the leading d / slots blocks are free afterwards, and
            decoding goes on with the table shifted by as many and seq_lens - d.
        backend: who does it.
    """
    args = (list(keys), list(values), block_table, list(keep), list(counts))
    _call("compact_paged_kv_", backend, block_table, args, {"seq_lens": seq_lens, "align_end": align_end})
