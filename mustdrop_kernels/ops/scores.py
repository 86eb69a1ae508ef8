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
    """Attention of the query rows on each vision token; float32, zero at other tokens."""

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
    """Sum and maximum over query rows of the head mean attention on each vision token (MustDrop, stage 2).

    P[h, t, j] = softmax over j <= t with type != 0 of scale * q[h, t] . k[h, j];
    total[j] = sum over t of mean over h of P[h, t, j]; peak[j] = max over t of mean over h of P[h, t, j];
    t runs over the rows whose type is QUERY.

    Args:
        q: (B, Hq, Lq, D) float, after RoPE. The position of row i is Lk - Lq + i, so chunks of rows can be scored
            separately: add the totals, take the maximum of the peaks.
        k: (B, Hk, Lk, D), after RoPE; Hq a multiple of Hk, Lq <= Lk.
        token_types: (B, Lk) uint8, see ``TokenType``.
        scale: factor of the scores, usually 1 / sqrt(D).
        lse: (B, Hq, Lq) float32, natural logarithm of the sum of exponentials of the scaled scores under this mask, any
            strides, if the attention kernel returned it; default: computed.
        backend: name of an explicit backend.

    Returns:
        total and peak, (B, Lk) float32, zero where the type is not VISION.
    """
    return Scores(*call("text_vision_scores", backend, q, q, k, token_types, scale, lse=lse))


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
        cu_seqlens_q: (B+1) int32, cumulative lengths of the sequences in q.
        cu_seqlens_k: (B+1) int32, the same for k. The position of row i of a sequence is length_k - length_q + i.
        max_seqlen_q: upper bound of the lengths in q.
        max_seqlen_k: upper bound of the lengths in k.
        scale: factor of the scores.
        lse: (Hq, total_q) float32, natural logarithm.
        backend: name of an explicit backend.

    Returns:
        total and peak, (total_k) float32.
    """
    args = (q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    return Scores(*call("text_vision_scores_varlen", backend, q, *args, lse=lse))


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
        cu_seqlens_q: (B+1) int32. The position of row i of sequence b is seq_lens[b] - length_q[b] + i.
        max_seqlen_q: upper bound of the lengths in q.
        scale: factor of the scores.
        lse: (Hq, total_q) float32, natural logarithm.
        backend: name of an explicit backend.

    Returns:
        total and peak, (B, max_len) float32.
    """
    args = (q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, scale)
    return Scores(*call("text_vision_scores_paged", backend, q, *args, lse=lse))


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
    """Head mean attention map, whose sum and maximum over rows are ``text_vision_scores``.

    For visualization, and for tensor parallelism, where each rank holds some heads: average the maps over the ranks,
    then take sum and maximum.

    Args:
        q: (B, Hq, Lq, D) float, the last Lq positions of each sequence.
        k: (B, Hk, Lk, D), of q's dtype.
        token_types: (B, Lk) uint8.
        scale: factor of the scores.
        max_query: number of rows of the result; query rows past it are left out.
        lse: (B, Hq, Lq) float32, natural logarithm.
        backend: name of an explicit backend.

    Returns:
        (B, max_query, Lk) float32: query rows in order; unused rows and columns that are not VISION are zero.
    """
    return call("text_vision_attention", backend, q, q, k, token_types, scale, max_query, lse=lse)


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
    check.tensor("k_cache", k_cache, ("blocks", "slots", "Hk", q.shape[2]), (q.dtype,), any_strides=True)
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
define(text_vision_scores_varlen, _check_varlen, fake_scores)
define(text_vision_scores_paged, _check_paged, fake_scores)
define(text_vision_attention, _check_attention, _fake_attention)
