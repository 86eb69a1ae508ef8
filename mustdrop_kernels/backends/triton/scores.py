# SPDX-License-Identifier: Apache-2.0
"""text_vision_scores and its variants: attention of the query rows on each vision token.

P[h, t, j] = softmax over j <= t with type != 0 of scale * q[h, t] . k[h, j]
total[j] = sum over query rows t of mean_h P[h, t, j];   peak[j] = max over query rows t of mean_h P[h, t, j]

The head mean is taken before the maximum, so a program owns a tile of keys and loops over the heads:
acc[keys, rows] += 2^(scale * k q^T - lse). Launches: the query rows of each sequence (few, and determined on the
device); their normalizers, unless the caller gives them; the scores; and, if keys are too few to fill the device and
the heads are split among programs, the reduction over the splits in a fixed order.
"""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor

from ...ops.contract import check
from . import configs
from .configs import config, head_class, length_class
from .launch import Launch, Plans, cdiv, power_of_two, signature
from .scores_kernels import HEADER, lse_kernel, map_kernel, reduce_kernel, rows_kernel, scores_kernel

# Number of query rows that go through the workspace when heads are split among programs; one program processes each
# further tile of rows for all heads.
SHARED_ROWS = 128


class _Plan:
    """Sizes of the workspace, and the launches. ``longest``: upper bounds of the sequence lengths in q and in k."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        types: Tensor,
        scale: float,
        lse: Tensor | None,
        batch: int,
        longest: tuple[int, int],
        table: Tensor | None = None,
        max_query: int = 0,
    ) -> None:
        dense, packed = q.dim() == 4, k.dim() == 3
        q_longest, k_longest = longest
        page_size = 0 if table is None else k.shape[1]
        blocks = 0 if table is None else k.shape[0]
        if dense:
            q_strides, k_strides = q.stride()[:3], (k.stride(0), k.stride(1), 0, k.stride(2), k.stride(3))
        else:
            q_strides = (0, q.stride(1), q.stride(0))
            k_strides = (
                (0, k.stride(1), 0, k.stride(0), k.stride(2))
                if packed
                else (0, k.stride(2), k.stride(0), k.stride(1), k.stride(3))
            )
        k_heads, dim = (k.shape[1] if dense or packed else k.shape[2]), q.shape[-1]
        heads = q.shape[1]
        group = heads // max(k_heads, 1)
        types_batch = 0 if types.dim() == 1 else types.stride(0)
        out_batch = 0 if types.dim() == 1 else types.shape[1]
        table_batch = 0 if table is None else table.stride(0)
        lse_strides = (0, 0, 0) if lse is None else lse.stride() if dense else (0, *lse.stride())

        chosen = config("scores", head_class(q.dtype, dim), q.device)
        rows, columns = power_of_two(q_longest, 16, chosen.ROWS), power_of_two(dim, 16, chosen.COLUMNS)
        tiles = cdiv(k_longest, chosen.KEYS)
        fill = configs.processors(q.device)
        lse_splits = power_of_two(2 * fill // max(batch * k_heads, 1), 1, 8)
        splits = power_of_two(fill // max(batch * tiles, 1), 1, 8)
        splits = max(min(splits, k_heads), 1)

        self.no_heads = heads == 0
        self.info = (batch, HEADER + q_longest)
        self.norms = (batch, heads, q_longest, 2) if lse is None else None
        self.shares = (batch, splits, k_longest, SHARED_ROWS) if splits > 1 else None
        self.tails = (batch, splits, 2, k_longest) if splits > 1 else None
        self.map = (batch, max_query, k_longest)

        line = config("scores_rows", length_class(q_longest), q.device)
        reach = k_longest if table is None else min(k_longest, table.shape[1] * page_size)
        extents = (q.shape[0], q_longest, k.shape[0], reach, blocks)
        self.rows = Launch(rows_kernel, (batch,), (*extents, types_batch, table_batch, page_size, line.BLOCK), line)
        scale = float(scale) * log2(e)
        common = (*q_strides, *k_strides, types_batch, table_batch)
        norm = config("scores_lse", head_class(q.dtype, dim), q.device)
        lines = power_of_two(16 * group, 16, norm.ROWS)  # heads that share a key share its load
        self.lse = Launch(
            lse_kernel,
            (batch * k_heads * lse_splits,),
            (
                scale, q_longest, blocks, *common,
                k_heads, group, dim, page_size, lse_splits, lines, norm.KEYS, power_of_two(dim, 16, norm.COLUMNS),
            ),
            norm,
        )  # fmt: skip
        product = (splits, SHARED_ROWS, chosen.KEYS, rows, columns)
        self.scores = Launch(
            scores_kernel,
            (batch * tiles * splits,),
            (
                scale, q_longest, k_longest, blocks, *common, out_batch, *lse_strides,
                k_heads, group, dim, page_size, packed, *product,
            ),
            chosen,
        )  # fmt: skip
        self.attention = Launch(
            map_kernel,
            (batch * tiles * cdiv(max_query, rows),),
            (
                scale, q_longest, k_longest, max_query, *q_strides, *k_strides, types_batch, *lse_strides,
                k_heads, group, dim, chosen.KEYS, rows, columns,
            ),
            chosen,
        )  # fmt: skip
        last = config("scores_reduce", "any", q.device)
        self.reduce = Launch(
            reduce_kernel,
            (batch * cdiv(k_longest, last.KEYS),),
            (
                q_longest, k_longest, blocks, types_batch, table_batch, out_batch,
                heads, page_size, packed, splits, SHARED_ROWS, last.KEYS, last.ROWS,
            ),
            last,
        )  # fmt: skip

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        types: Tensor,
        lse: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seq_lens: Tensor | None = None,
        table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the query rows, and their normalizers unless the caller gives them."""
        info = torch.empty(self.info, dtype=torch.int32, device=q.device)
        self.rows(types, cu_seqlens_q, cu_seqlens_k, seq_lens, table, info)
        if self.norms is None:
            return info, None
        norms = _floats(self.norms, q)
        self.lse(q, k, types, table, info, norms)
        return info, norms

    def run(
        self,
        q: Tensor,
        k: Tensor,
        types: Tensor,
        lse: Tensor | None,
        out: tuple[Tensor, Tensor],
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seq_lens: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """Launch on the current stream."""
        if self.no_heads:
            for result in out:
                result.zero_()
            return
        info, norms = self.prepare(q, k, types, lse, cu_seqlens_q, cu_seqlens_k, seq_lens, table)
        shares = tails = None
        if self.shares is not None and self.tails is not None:
            shares, tails = _floats(self.shares, q), _floats(self.tails, q)
        self.scores(q, k, types, lse, table, info, norms, *out, shares, tails)
        if shares is not None:
            self.reduce(types, table, info, shares, tails, *out)


def _floats(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


_plans: dict[str, Plans] = {op: Plans() for op in ("dense", "map", "varlen", "paged")}


def _scores_like(types: Tensor) -> tuple[Tensor, Tensor]:
    return _floats(tuple(types.shape), types), _floats(tuple(types.shape), types)


def text_vision_scores(
    q: Tensor,  # [B, Hq, Lq, D]
    k: Tensor,  # [B, Hk, Lk, D]
    token_types: Tensor,  # [B, Lk]
    scale: float,
    *,
    lse: Tensor | None = None,  # [B, Hq, Lq]
) -> tuple[Tensor, Tensor]:
    """See ``mustdrop_kernels.text_vision_scores``."""
    key = signature(q, k, token_types, scale, lse)
    plan = _plans["dense"].get(key)
    if plan is None:
        check("text_vision_scores", q, k, token_types, scale, lse=lse)
        longest = (q.shape[2], k.shape[2])
        plan = _plans["dense"].add(key, _Plan(q, k, token_types, scale, lse, q.shape[0], longest))
    out = _scores_like(token_types)
    plan.run(q, k, token_types, lse, out)
    return out


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
    key = signature(q, k, token_types, scale, max_query, lse)
    plan = _plans["map"].get(key)
    if plan is None:
        check("text_vision_attention", q, k, token_types, scale, max_query, lse=lse)
        longest = (q.shape[2], k.shape[2])
        made = _Plan(q, k, token_types, scale, lse, q.shape[0], longest, max_query=max_query)
        plan = _plans["map"].add(key, made)
    out = _floats(plan.map, q)
    if plan.no_heads:
        return out.zero_()
    info, norms = plan.prepare(q, k, token_types, lse)
    plan.attention(q, k, token_types, lse, info, norms, out)
    return out


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
    key = signature(q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, lse)
    plan = _plans["varlen"].get(key)
    if plan is None:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check("text_vision_scores_varlen", q, k, token_types, *lengths, scale, lse=lse)
        longest = (min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0]))
        made = _Plan(q, k, token_types, scale, lse, cu_seqlens_q.shape[0] - 1, longest)
        plan = _plans["varlen"].add(key, made)
    # Tokens outside of every sequence are zero, and no program owns them.
    total, peak = torch.zeros(2, k.shape[0], dtype=torch.float32, device=k.device)
    plan.run(q, k, token_types, lse, (total, peak), cu_seqlens_q, cu_seqlens_k)
    return total, peak


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
    key = signature(q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, scale, lse)
    plan = _plans["paged"].get(key)
    if plan is None:
        cache = (k_cache, block_table, seq_lens)
        check("text_vision_scores_paged", q, *cache, token_types, cu_seqlens_q, max_seqlen_q, scale, lse=lse)
        longest = (min(max_seqlen_q, q.shape[0]), token_types.shape[1])
        made = _Plan(q, k_cache, token_types, scale, lse, seq_lens.shape[0], longest, block_table)
        plan = _plans["paged"].add(key, made)
    out = _scores_like(token_types)
    plan.run(q, k_cache, token_types, lse, out, cu_seqlens_q, None, seq_lens, block_table)
    return out
