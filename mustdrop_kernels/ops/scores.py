# SPDX-License-Identifier: Apache-2.0
"""Text-to-vision scores of dense, packed and paged keys (MustDrop, stage 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .contract import Call, define
from .dispatch import call

__all__ = [
    "Scores",
    "text_vision_attention",
    "text_vision_scores",
    "text_vision_scores_paged",
    "text_vision_scores_varlen",
]


class Scores(NamedTuple):
    """Attention of the text queries on each vision token; float32, zero at all other tokens."""

    total: Tensor  # sum over query rows of the head mean
    peak: Tensor  # maximum over query rows of the head mean


def text_vision_scores(
    q: Tensor,
    k: Tensor,
    token_types: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Scores:
    """Compute sum and maximum over text queries of the head mean attention on each vision token.

    MustDrop (arXiv 2411.10803), stage 2, dual-attention filtering; for a dense batch.
    P[h, t, j] = softmax over j <= t with type != PADDING of scale * q[h, t] . k[h, j];
    total[j] = sum over t of mean over h of P[h, t, j]; peak[j] = max over t of mean over h of P[h, t, j];
    t runs over the rows of type QUERY. A row without keys adds zero.

    Args:
        q: (B, Hq, Lq, D) float32, float16 or bfloat16, after RoPE. Row i has position Lk - Lq + i, so that a prompt can
            be scored in parts: totals add up, peaks take the maximum.
        k: (B, Hk, Lk, D) of q's dtype, after RoPE. Hq is a multiple of Hk, Lq <= Lk.
        token_types: (B, Lk) uint8, values of ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        lse: (B, Hq, Lq) float32 with any strides, natural log-sum-exp of the scaled scores under this mask, if the
            attention kernel returns it. It saves one of two passes over the keys.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        total and peak, (B, Lk) float32, zero where the type is not VISION. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    return Scores(*call("text_vision_scores", backend, q, k, token_types, scale, lse=lse))


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
    """Compute ``text_vision_scores`` of a packed batch of B sequences.

    MustDrop (arXiv 2411.10803), stage 2. Row i of a sequence has position length_k - length_q + i in it. Cumulative
    lengths are clamped to the tensors.

    Args:
        q: (total_q, Hq, D) float32, float16 or bfloat16, after RoPE.
        k: (total_k, Hk, D) of q's dtype, after RoPE. Hq is a multiple of Hk.
        token_types: (total_k) uint8, values of ``TokenType``.
        cu_seqlens_q: (B+1) int32, cumulative lengths: sequence b has rows cu_seqlens_q[b] to cu_seqlens_q[b+1] of q.
        cu_seqlens_k: (B+1) int32, the same for k.
        max_seqlen_q: upper bound of the lengths in q.
        max_seqlen_k: upper bound of the lengths in k.
        scale: factor of the scores, usually 1 / sqrt(D).
        lse: (Hq, total_q) float32 with any strides, natural log-sum-exp of the scaled scores.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        total and peak, (total_k) float32, zero where the type is not VISION. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    return Scores(*call("text_vision_scores_varlen", backend, *args, lse=lse))


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
    """Compute ``text_vision_scores`` of a packed batch of B sequences whose keys are in a paged KV cache.

    MustDrop (arXiv 2411.10803), stage 2. Position p of sequence b is at slot p % page_size of block
    block_table[b, p // page_size], with page_size = k_cache.shape[1]. Row i of sequence b has position
    seq_lens[b] - length_q[b] + i. Keys in blocks outside the cache are masked.

    Args:
        q: (total_q, Hq, D) float32, float16 or bfloat16, after RoPE.
        k_cache: (blocks, page_size, Hk, D) of q's dtype, after RoPE; any strides. Hq is a multiple of Hk.
        block_table: (B, max_blocks) int32.
        seq_lens: (B) int32, number of cached tokens of each sequence, those of q included.
        token_types: (B, max_len) uint8, values of ``TokenType``.
        cu_seqlens_q: (B+1) int32, cumulative lengths: sequence b has rows cu_seqlens_q[b] to cu_seqlens_q[b+1] of q.
        max_seqlen_q: upper bound of the lengths in q.
        scale: factor of the scores, usually 1 / sqrt(D).
        lse: (Hq, total_q) float32 with any strides, natural log-sum-exp of the scaled scores.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        total and peak, (B, max_len) float32, zero where the type is not VISION. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    args = (q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, scale)
    return Scores(*call("text_vision_scores_paged", backend, *args, lse=lse))


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
    """Compute the head mean attention map of the text queries, of which ``text_vision_scores`` are sum and maximum.

    MustDrop (arXiv 2411.10803), stage 2: result[b, r, j] = mean over h of P[h, t, j] for the r-th query row t. For
    heat maps, and for tensor parallelism, where each rank holds some of the heads: average the maps over the ranks,
    then take sum and maximum over the rows.

    Args:
        q: (B, Hq, Lq, D) float32, float16 or bfloat16, after RoPE: the last Lq positions of each sequence.
        k: (B, Hk, Lk, D) of q's dtype, after RoPE. Hq is a multiple of Hk, Lq <= Lk.
        token_types: (B, Lk) uint8, values of ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        max_query: number of rows of the result; further query rows are left out.
        lse: (B, Hq, Lq) float32 with any strides, natural log-sum-exp of the scaled scores.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        (B, max_query, Lk) float32: query rows in order, then zero rows; columns of other types than VISION are zero.
        Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    return call("text_vision_attention", backend, q, k, token_types, scale, max_query, lse=lse)


def check_dense(a: Call) -> Checker:
    """Check q, k, token_types and lse of a dense batch."""
    q, k = a.q, a.k
    check = Checker(a, q)
    check.tensor("q", q, ("B", "Hq", "Lq", "D"), FLOATS)
    check.tensor("k", k, (q.shape[0], "Hk", "Lk", q.shape[3]), (q.dtype,))
    _check_heads(check, "k", q.shape[1], k.shape[1])
    check(q.shape[2] <= k.shape[2], "q", f"must not have more rows than k, {k.shape[2]}, got {q.shape[2]}")
    check.tensor("token_types", a.token_types, (q.shape[0], k.shape[2]), (torch.uint8,))
    if a.lse is not None:
        check.tensor("lse", a.lse, tuple(q.shape[:3]), (torch.float32,), any_strides=True)
    return check


def _check_heads(check: Checker, argument: str, hq: int, hk: int) -> None:
    ok = hk > 0 and hq % hk == 0 if hq else True
    check(ok, argument, f"must have a number of heads that divides the query's {hq}, got {hk}")


def _check_packed_query(a: Call) -> Checker:
    check = Checker(a, a.q)
    check.tensor("q", a.q, ("total_q", "Hq", "D"), FLOATS)
    check.tensor("cu_seqlens_q", a.cu_seqlens_q, ("B+1",), (torch.int32,))
    check.at_least("cu_seqlens_q", a.cu_seqlens_q.shape[0], 1)
    if a.lse is not None:
        check.tensor("lse", a.lse, (a.q.shape[1], a.q.shape[0]), (torch.float32,), any_strides=True)
    return check


def _check_scores(a: Call) -> None:
    check_dense(a)


def _check_varlen(a: Call) -> None:
    check = _check_packed_query(a)
    q, k = a.q, a.k
    check.tensor("k", k, ("total_k", "Hk", q.shape[2]), (q.dtype,))
    _check_heads(check, "k", q.shape[1], k.shape[1])
    check.tensor("token_types", a.token_types, (k.shape[0],), (torch.uint8,))
    check.tensor("cu_seqlens_k", a.cu_seqlens_k, (a.cu_seqlens_q.shape[0],), (torch.int32,))
    check.at_least("max_seqlen_q", a.max_seqlen_q, 0)
    check.at_least("max_seqlen_k", a.max_seqlen_k, 0)


def _check_paged(a: Call) -> None:
    check = _check_packed_query(a)
    q, k_cache = a.q, a.k_cache
    check.tensor("k_cache", k_cache, ("blocks", "page_size", "Hk", q.shape[2]), (q.dtype,), any_strides=True)
    check.at_least("k_cache", k_cache.shape[1], 1)
    _check_heads(check, "k_cache", q.shape[1], k_cache.shape[2])
    batch = a.cu_seqlens_q.shape[0] - 1
    check.tensor("block_table", a.block_table, (batch, "max_blocks"), (torch.int32,))
    check.tensor("seq_lens", a.seq_lens, (batch,), (torch.int32,))
    check.tensor("token_types", a.token_types, (batch, "max_len"), (torch.uint8,))
    check.at_least("max_seqlen_q", a.max_seqlen_q, 0)


def _check_attention(a: Call) -> None:
    check_dense(a).at_least("max_query", a.max_query, 0)


def fake_scores(a: Call) -> tuple[Tensor, Tensor]:
    """Two float32 tensors of token_types' shape."""
    shape = tuple(a.token_types.shape)
    return a.token_types.new_empty(shape, dtype=torch.float32), a.token_types.new_empty(shape, dtype=torch.float32)


def _fake_attention(a: Call) -> Tensor:
    return a.q.new_empty(a.q.shape[0], a.max_query, a.k.shape[2], dtype=torch.float32)


define(text_vision_scores, _check_scores, fake_scores)
define(text_vision_scores_varlen, _check_varlen, fake_scores, folds=lambda call: False)
define(text_vision_scores_paged, _check_paged, fake_scores, folds=lambda call: False)
define(text_vision_attention, _check_attention, _fake_attention)
