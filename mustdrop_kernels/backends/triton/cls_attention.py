# SPDX-License-Identifier: Apache-2.0
"""cls_attention: out[b, j] = mean over h of softmax_j(scale * q[b, h] . k[b, h, j]), zero for prefix and padding.

Two kernels: the scores of a tile of keys with its maximum and sum of exponentials, then normalizer and head mean. The
attention map is never built; the scores in between are 4 bytes where the key has 4 D or 2 D.
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.contract import check
from .configs import config
from .launch import Launch, Plans, cdiv, power_of_two, signature
from .numbers import widen


@triton.jit(do_not_specialize=["heads", "length", "counts_batch"])
def _cls_scores_kernel(
    q,  # [B, H, D]
    k,  # [B, H, S, D]
    counts,  # [B] int32, or None: all of S
    scores,  # [B, H, S] float32: scale * q . k / log(2)
    stats,  # [B, H, tiles, 2] float32: maximum of a tile, sum of 2^(score - maximum)
    scale,  # times log2(e)
    heads,
    length,  # S
    q_batch, q_head,
    k_batch, k_head, k_token,
    counts_batch,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program, ROWS keys of one head."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(length, ROWS)
    row = pid % tiles * ROWS + tl.arange(0, ROWS)
    h = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    number = length if counts is None else tl.minimum(tl.load(counts + b * counts_batch), length)
    real = row < number

    score = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        query = widen(tl.load(q + b * q_batch + h * q_head + d, mask=d < D, other=0.0))
        at = k + b * k_batch + h * k_head + row.to(tl.int64)[:, None] * k_token + d[None, :]
        key = widen(tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0))
        score += tl.sum(key * query[None, :], axis=1)
    score = tl.where(real, score * scale, float("-inf"))
    top = tl.max(score, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)  # a tile of padding only
    tl.store(scores + (b * heads + h) * length + row, score, mask=row < length)
    tl.store(stats + 2 * pid, top)
    tl.store(stats + 2 * pid + 1, tl.sum(tl.exp2(score - base), axis=0))


@triton.jit(do_not_specialize=["heads", "length", "tiles", "prefix", "counts_batch"])
def _cls_mean_kernel(
    scores,  # [B, H, S] float32
    stats,  # [B, H, tiles, 2] float32
    counts,  # [B] int32, or None
    out,  # [B, S] float32
    share,  # 1 / H
    heads,
    length,
    tiles,
    prefix,
    counts_batch,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, ROWS keys of all heads, added in order."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(length, ROWS)
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    b = (pid // blocks).to(tl.int64)
    number = length if counts is None else tl.minimum(tl.load(counts + b * counts_batch), length)
    shown = (row >= prefix) & (row < number)

    tile = tl.arange(0, TILES)
    mean = tl.zeros([ROWS], tl.float32)
    for h in range(0, heads):
        head = b * heads + h
        top = tl.load(stats + 2 * (head * tiles + tile), mask=tile < tiles, other=float("-inf"))
        part = tl.load(stats + 2 * (head * tiles + tile) + 1, mask=tile < tiles, other=0.0)
        most = tl.max(top, axis=0)
        most = tl.where(most == float("-inf"), 0.0, most)
        mass = tl.sum(part * tl.exp2(top - most), axis=0)
        score = tl.load(scores + head * length + row, mask=shown, other=float("-inf"))
        mean += tl.where(mass == 0.0, 0.0, tl.exp2(score - most) / mass)
    tl.store(out + b * length + row, tl.where(shown, mean * share, 0.0), mask=row < length)


_plans = Plans()


def cls_attention(
    q: Tensor,  # [B, H, D]
    k: Tensor,  # [B, H, S, D]
    scale: float,
    *,
    counts: Tensor | None = None,  # [B]
    num_prefix_tokens: int = 1,
) -> Tensor:  # [B, S]
    """See ``mustdrop_kernels.cls_attention``."""
    key = signature(q, k, scale, counts, num_prefix_tokens)
    plan = _plans.get(key)
    if plan is None:
        check("cls_attention", q, k, scale, counts=counts, num_prefix_tokens=num_prefix_tokens)
        plan = _plans.add(key, _plan(q, k, scale, counts, num_prefix_tokens))
    score, mean, tiles = plan
    batch, heads, length, _ = k.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=k.device)
    scores = torch.empty(batch, heads, length, dtype=torch.float32, device=k.device)
    stats = torch.empty(batch, heads, tiles, 2, dtype=torch.float32, device=k.device)
    score(q, k, counts, scores, stats)
    mean(scores, stats, counts, out)
    return out


def _plan(q: Tensor, k: Tensor, scale: float, counts: Tensor | None, prefix: int) -> tuple[Launch, Launch, int]:
    batch, heads, length, dim = k.shape
    counts_batch = 0 if counts is None else counts.stride(0)
    tile = config("cls_scores", "any", k.device)
    tiles = cdiv(length, tile.ROWS)
    columns = power_of_two(dim, 16, tile.COLUMNS)
    score = Launch(
        _cls_scores_kernel,
        (batch * heads * tiles,),
        (
            scale * log2(torch.e), heads, length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
            counts_batch, dim, tile.ROWS, columns,
        ),
        tile,
    )  # fmt: skip
    block = config("cls_mean", "any", k.device)
    mean = Launch(
        _cls_mean_kernel,
        (batch * cdiv(length, block.ROWS),),
        (1 / max(heads, 1), heads, length, tiles, prefix, counts_batch, power_of_two(tiles), block.ROWS),
        block,
    )
    return score, mean, tiles
