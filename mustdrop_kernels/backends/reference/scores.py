# SPDX-License-Identifier: Apache-2.0
"""Attention of text queries on each vision token: dense, packed and paged."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.token_types import TokenType


def softmax(
    scores: Tensor,  # [..., L]
    visible: Tensor,  # [..., L] bool
    lse: Tensor | None,  # [...]
) -> Tensor:
    """Masked softmax; a row without visible keys gives zeros."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if lse is None:  # not by way of the normalizer, which drops the terms after the largest of huge scores
        nothing = scores.isneginf().all(-1, keepdim=True)
        return scores.softmax(-1).masked_fill(~visible | nothing, 0.0)
    probability = (scores - lse[..., None]).exp()
    return probability.masked_fill(~visible | lse[..., None].isneginf(), 0.0)


def _head_mean(
    q: Tensor,  # [B, Hq, R, D]
    k: Tensor,  # [B, Hk, L, D]
    token_types: Tensor,  # [B, L]; 0 where there is no key
    position: Tensor,  # [B, R]; negative where there is no row
    scale: float,
    lse: Tensor | None,  # [B, Hq, R]
) -> tuple[Tensor, Tensor]:
    """Head mean map [B, R, L] on query rows and vision columns, zero elsewhere; and the mask of query rows."""
    group = q.shape[1] // max(k.shape[1], 1)
    # In float64: torch may be set to multiply float32 in less.
    scores = scale * q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)  # [B, Hq, R, L]
    column = torch.arange(k.shape[2], device=k.device)
    visible = (token_types != TokenType.PADDING)[:, None] & (column <= position[..., None])  # [B, R, L]
    probability = softmax(scores, visible[:, None], lse).sum(1) / max(q.shape[1], 1)
    inside = (position >= 0) & (position < k.shape[2])
    query = inside & (_take(token_types, position.clamp(0, max(k.shape[2] - 1, 0))) == TokenType.QUERY)  # [B, R]
    shown = query[..., None] & (token_types == TokenType.VISION)[:, None]
    return probability.masked_fill(~shown, 0.0).float(), query


def _take(token_types: Tensor, index: Tensor) -> Tensor:
    return token_types.gather(1, index) if token_types.shape[1] else torch.zeros_like(index)


def _reduce(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and maximum over rows of [B, R, L]."""
    if attention.shape[1] == 0:
        return attention.sum(1), attention.sum(1)
    return attention.sum(1), attention.amax(1)


def _dense_positions(q: Tensor, k: Tensor) -> Tensor:
    """[B, Lq]: the position of row i is Lk - Lq + i."""
    return torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device).expand(q.shape[0], -1)


def text_vision_scores(
    q: Tensor,  # [B, Hq, Lq, D]
    k: Tensor,  # [B, Hk, Lk, D]
    token_types: Tensor,  # [B, Lk]
    scale: float,
    *,
    lse: Tensor | None = None,  # [B, Hq, Lq]
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.text_vision_scores``."""
    return _reduce(_head_mean(q, k, token_types, _dense_positions(q, k), scale, lse)[0])


def text_vision_attention(
    q: Tensor,  # [B, Hq, Lq, D]
    k: Tensor,  # [B, Hk, Lk, D]
    token_types: Tensor,  # [B, Lk]
    scale: float,
    max_query: int,
    *,
    lse: Tensor | None = None,  # [B, Hq, Lq]
) -> Tensor:  # [B, max_query, Lk]
    """See ``mustdrop_kernels.text_vision_attention``."""
    attention, query = _head_mean(q, k, token_types, _dense_positions(q, k), scale, lse)
    # Query rows in order, to the rows 0, 1, ...; one extra row collects the others.
    place = (query.cumsum(1) - 1).masked_fill(~query, max_query).clamp(max=max_query)
    out = attention.new_zeros(q.shape[0], max_query + 1, k.shape[2])
    return out.scatter_(1, place[..., None].expand_as(attention), attention)[:, :max_query].clone()


def _sequences(cu_seqlens: Tensor, total: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of each sequence in a packed tensor: index [B, longest], valid [B, longest], length [B]."""
    begin = cu_seqlens[:-1].long().clamp(0, total)
    length = (cu_seqlens[1:].long().clamp(0, total) - begin).clamp(0, longest)
    offset = torch.arange(longest, device=cu_seqlens.device)
    valid = offset < length[:, None]
    return torch.where(valid, begin[:, None] + offset, 0), valid, length


def _packed_rows(
    q: Tensor,  # [total_q, Hq, D]
    cu_seqlens_q: Tensor,  # [B+1]
    max_seqlen_q: int,
    length_k: Tensor,  # [B]
    lse: Tensor | None,  # [Hq, total_q]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded query [B, Hq, R, D], its positions [B, R] (negative where there is no row), padded lse [B, Hq, R]."""
    index, valid, length_q = _sequences(cu_seqlens_q, q.shape[0], min(max_seqlen_q, q.shape[0]))
    position = length_k[:, None] - length_q[:, None] + torch.arange(index.shape[1], device=q.device)
    rows = q[index].transpose(1, 2)
    return rows, position.masked_fill(~valid, -1), None if lse is None else lse[:, index].transpose(0, 1)


def text_vision_scores_varlen(
    q: Tensor,  # [total_q, Hq, D]
    k: Tensor,  # [total_k, Hk, D]
    token_types: Tensor,  # [total_k]
    cu_seqlens_q: Tensor,  # [B+1]
    cu_seqlens_k: Tensor,  # [B+1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    *,
    lse: Tensor | None = None,  # [Hq, total_q]
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.text_vision_scores_varlen``."""
    total_k = k.shape[0]
    index, valid, length_k = _sequences(cu_seqlens_k, total_k, min(max_seqlen_k, total_k))
    rows, position, lse = _packed_rows(q, cu_seqlens_q, max_seqlen_q, length_k, lse)
    types = token_types[index].masked_fill(~valid, 0)
    total, peak = _reduce(_head_mean(rows, k[index].transpose(1, 2), types, position, scale, lse)[0])
    target = torch.where(valid, index, total_k).flatten()  # one extra slot collects the padding
    flat = q.new_zeros(2, total_k + 1, dtype=torch.float32)
    flat[0].scatter_(0, target, total.flatten())
    flat[1].scatter_(0, target, peak.flatten())
    return flat[0, :total_k].clone(), flat[1, :total_k].clone()


def text_vision_scores_paged(
    q: Tensor,  # [total_q, Hq, D]
    k_cache: Tensor,  # [blocks, page_size, Hk, D]
    block_table: Tensor,  # [B, max_blocks]
    seq_lens: Tensor,  # [B]
    token_types: Tensor,  # [B, max_len]
    cu_seqlens_q: Tensor,  # [B+1]
    max_seqlen_q: int,
    scale: float,
    *,
    lse: Tensor | None = None,  # [Hq, total_q]
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.text_vision_scores_paged``."""
    blocks, page_size = k_cache.shape[:2]
    batch, longest = token_types.shape
    column = torch.arange(min(longest, block_table.shape[1] * page_size), device=q.device)
    length_k = seq_lens.long().clamp(0, len(column))
    block = block_table.long()[:, column // page_size]  # [B, L]
    exists = (block >= 0) & (block < blocks) & (column < length_k[:, None])
    if blocks:
        k = k_cache[torch.where(exists, block, 0), column % page_size].transpose(1, 2)  # [B, Hk, L, D]
    else:
        k = k_cache.new_zeros(batch, k_cache.shape[2], len(column), k_cache.shape[3])
    k = k.masked_fill(~exists[:, None, :, None], 0.0)
    rows, position, lse = _packed_rows(q, cu_seqlens_q, max_seqlen_q, length_k, lse)
    types = token_types[:, : len(column)].masked_fill(~exists, 0)
    total, peak = _reduce(_head_mean(rows, k, types, position, scale, lse)[0])
    missing = (0, longest - len(column))
    return torch.nn.functional.pad(total, missing), torch.nn.functional.pad(peak, missing)
