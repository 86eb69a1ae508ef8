# SPDX-License-Identifier: Apache-2.0
"""The operators in float64 NumPy, transcribed from their formulas without optimization.

Independent of torch and of the backends: inputs are arrays whose values are already rounded to the dtype under test.
Thresholds are rounded to float32 first, as specified. Moves work on arrays of bytes.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

PADDING, TEXT, VISION, QUERY = 0, 1, 2, 3


# ---------------------------------------------------------------------------------------------- spatial_merge


class Merge(NamedTuple):
    tokens: np.ndarray  # (B, length, C)
    counts: np.ndarray  # (B,)
    assignment: np.ndarray  # (B, P+N)
    sizes: np.ndarray  # (B, length)
    similarity: np.ndarray  # (B, windows), -inf for a window of one token
    merged: list  # per image: indices of the merged windows, in window order


def window_members(grid: list[int], window: list[int]) -> tuple[list[list[int]], list[bool]]:
    """Token indices of each window in raster order, and whether the window is whole (not cut by the border)."""
    steps = [range(0, g, w) for g, w in zip(grid, window, strict=True)]
    members, whole = [], []
    for origin in itertools.product(*steps):
        ranges = [range(o, min(o + w, g)) for o, w, g in zip(origin, window, grid, strict=True)]
        tokens = []
        for place in itertools.product(*ranges):
            index = 0
            for coordinate, extent in zip(place, grid, strict=True):
                index = index * extent + coordinate
            tokens.append(index)
        members.append(tokens)
        whole.append(len(tokens) == math.prod(window))
    return members, whole


VANISHED = 2.0**-63  # norm of a token below which it counts as zero (docs/ops/spatial_merge.md)


def window_similarity(tokens: np.ndarray) -> float:
    """Mean cosine over the ordered pairs i != j of a window's tokens (n, C); -inf where there is no pair."""
    n = len(tokens)
    if n < 2:
        return -math.inf
    with np.errstate(invalid="ignore"):  # infinite tokens
        norms = [math.sqrt(float(t @ t)) for t in tokens]
        unit = [t / max(norm, 1e-8) if not norm < VANISHED else 0 * t for t, norm in zip(tokens, norms, strict=True)]
    pairs = [float(unit[i] @ unit[j]) for i in range(n) for j in range(n) if i != j]
    return sum(pairs) / len(pairs)


def falling(values: list[float], candidates: list[int]) -> list[int]:
    """Candidates by descending value; ties by ascending index; NaN last."""

    def key(index: int) -> tuple:
        value = float(values[index])
        return (1, 0.0, index) if math.isnan(value) else (0, -value, index)

    return sorted(candidates, key=key)


def spatial_merge(
    x: np.ndarray,
    grid: list[int],
    window: list[int],
    threshold: float = 0.8,
    *,
    budget: int | None = None,
    uniform: bool = False,
    num_prefix_tokens: int = 1,
    sizes: np.ndarray | None = None,
    merged_first: bool = False,
) -> Merge:
    batch, length, channels = x.shape
    prefix = num_prefix_tokens
    limit = float(np.float32(threshold))
    members, whole = window_members(grid, window)
    sizes_in = np.ones((batch, length)) if sizes is None else sizes
    similarity = np.array(
        [[window_similarity(x[b, [prefix + t for t in m]]) for m in members] for b in range(batch)]
    ).reshape(batch, len(members))

    mergeable = [w for w, m in enumerate(members) if len(m) > 1]
    if uniform or budget is not None:
        mergeable = [w for w in mergeable if whole[w]]
    above = [[w for w in mergeable if similarity[b, w] >= limit] for b in range(batch)]
    if budget is not None:
        chosen = [falling(similarity[b], mergeable)[:budget] for b in range(batch)]
    elif uniform:
        r = min((len(a) for a in above), default=0)
        chosen = [falling(similarity[b], mergeable)[:r] for b in range(batch)]
    else:
        chosen = above

    capacity = length if budget is None else length - budget * (math.prod(window) - 1)
    out = np.zeros((batch, capacity, channels))
    out_sizes = np.zeros((batch, capacity))
    counts = np.zeros(batch, dtype=np.int64)
    assignment = np.full((batch, length), -1, dtype=np.int64)
    for b in range(batch):
        for row, group in enumerate(output_order(members, chosen[b], similarity[b], prefix, length, merged_first)):
            weight = sizes_in[b, group]
            if len(group) == 1:
                out[b, row] = x[b, group[0]]
            else:
                with np.errstate(all="ignore"):
                    out[b, row] = (weight[:, None] * x[b, group]).sum(0) / weight.sum()
            out_sizes[b, row] = weight.sum()
            assignment[b, group] = row
            counts[b] = row + 1
    return Merge(out, counts, assignment, out_sizes, similarity, [sorted(c) for c in chosen])


def output_order(
    members: list[list[int]], chosen: list[int], similarity: np.ndarray, prefix: int, length: int, merged_first: bool
) -> list[list[int]]:
    """Groups of input rows in output order; a group of one is an unmerged token."""
    groups = {members[w][0]: [prefix + t for t in members[w]] for w in chosen}
    inside = {t for w in chosen for t in members[w]}
    order = [[p] for p in range(prefix)]
    if merged_first:
        order += [[prefix + t for t in members[w]] for w in falling(similarity, chosen)]
        return order + [[prefix + t] for t in range(length - prefix) if t not in inside]
    for t in range(length - prefix):
        if t in groups:
            order.append(groups[t])
        elif t not in inside:
            order.append([prefix + t])
    return order


# ---------------------------------------------------------------------------------------------- attention


def cls_attention(
    q: np.ndarray, k: np.ndarray, scale: float, counts: np.ndarray | None = None, num_prefix_tokens: int = 1
) -> np.ndarray:
    """q (B, H, D), k (B, H, S, D) -> (B, S)."""
    batch, heads, span = k.shape[:3]
    out = np.zeros((batch, span))
    for b in range(batch):
        n = span if counts is None else max(0, min(int(counts[b]), span))
        if n == 0 or heads == 0:
            continue
        rows = [softmax(k[b, h, :n] @ q[b, h] * scale) for h in range(heads)]
        out[b, :n] = sum(rows) / heads
        out[b, :num_prefix_tokens] = 0
    return out


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax of one row; a row of -inf only gives zeros."""
    top = scores.max() if scores.size else -math.inf
    if top == -math.inf:
        return np.zeros_like(scores)
    weights = np.exp(scores - top)
    return weights / weights.sum()


def log_sum_exp(q: np.ndarray, k: np.ndarray, types: np.ndarray, scale: float) -> np.ndarray:
    """q (Hq, Lq, D), k (Hk, Lk, D), types (Lk) -> (Hq, Lq): the row normalizers under the contract's mask."""
    heads, rows, _ = q.shape
    group = heads // max(k.shape[0], 1)
    out = np.full((heads, rows), -math.inf)
    for i in range(rows):
        seen = visible(len(types) - rows + i, types)
        for h in range(heads):
            scores = k[h // group, seen] @ q[h, i] * scale
            if scores.size:
                top = scores.max()
                out[h, i] = top + math.log(np.exp(scores - top).sum()) if top > -math.inf else top
    return out


def visible(position: int, types: np.ndarray) -> np.ndarray:
    """Columns that a row at this position attends to: none after it, no padding."""
    return np.array([j for j in range(len(types)) if j <= position and types[j] != PADDING], dtype=np.int64)


def attention_map(
    q: np.ndarray, k: np.ndarray, types: np.ndarray, scale: float, lse: np.ndarray | None = None
) -> np.ndarray:
    """One sequence: q (Hq, Lq, D), k (Hk, Lk, D), types (Lk), lse (Hq, Lq) -> (query rows, Lk), the head mean.

    The position of row i of q is Lk - Lq + i; a row before the sequence (Lq > Lk) is no query row and has no keys.
    """
    heads, rows, _ = q.shape
    length = len(types)
    group = heads // max(k.shape[0], 1)
    out = []
    for i in range(rows):
        position = length - rows + i
        if position < 0 or types[position] != QUERY:
            continue
        seen = visible(position, types)
        mean = np.zeros(length)
        for h in range(heads):
            scores = k[h // group, seen] @ q[h, i] * scale
            if lse is None:
                mean[seen] += softmax(scores) / heads
            elif lse[h, i] != -math.inf:
                mean[seen] += np.exp(scores - lse[h, i]) / heads
        out.append(np.where(types == VISION, mean, 0.0))
    return np.array(out).reshape(len(out), length)


def scores(
    q: np.ndarray, k: np.ndarray, types: np.ndarray, scale: float, lse: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: total and peak, each (Lk,)."""
    rows = attention_map(q, k, types, scale, lse)
    if len(rows) == 0:
        return np.zeros(len(types)), np.zeros(len(types))
    return rows.sum(0), rows.max(0)


def text_vision_scores(q, k, token_types, scale, lse=None) -> tuple[np.ndarray, np.ndarray]:
    """q (B, Hq, Lq, D), k (B, Hk, Lk, D), token_types (B, Lk), lse (B, Hq, Lq) -> two (B, Lk)."""
    each = [scores(q[b], k[b], token_types[b], scale, None if lse is None else lse[b]) for b in range(len(q))]
    total = np.array([t for t, _ in each]).reshape(token_types.shape)
    peak = np.array([p for _, p in each]).reshape(token_types.shape)
    return total, peak


def text_vision_attention(q, k, token_types, scale, max_query, lse=None) -> np.ndarray:
    """-> (B, max_query, Lk): the query rows in order, as many as fit."""
    out = np.zeros((len(q), max_query, token_types.shape[1]))
    for b in range(len(q)):
        rows = attention_map(q[b], k[b], token_types[b], scale, None if lse is None else lse[b])[:max_query]
        out[b, : len(rows)] = rows
    return out


def spans(cumulative: np.ndarray, extent: int) -> list[tuple[int, int]]:
    """(start, end) of each sequence, clamped to the packed tensor."""
    clamped = [max(0, min(int(c), extent)) for c in cumulative]
    return [(a, max(a, b)) for a, b in itertools.pairwise(clamped)]


def text_vision_scores_varlen(q, k, token_types, cu_seqlens_q, cu_seqlens_k, scale, lse=None):
    """q (total_q, Hq, D), k (total_k, Hk, D), token_types (total_k), lse (Hq, total_q) -> two (total_k,)."""
    total, peak = np.zeros(len(token_types)), np.zeros(len(token_types))
    for (q0, q1), (k0, k1) in zip(spans(cu_seqlens_q, len(q)), spans(cu_seqlens_k, len(k)), strict=True):
        part = None if lse is None else lse[:, q0:q1]
        total[k0:k1], peak[k0:k1] = scores(
            q[q0:q1].transpose(1, 0, 2), k[k0:k1].transpose(1, 0, 2), token_types[k0:k1], scale, part
        )
    return total, peak


def text_vision_scores_paged(q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, scale, lse=None):
    """q (total_q, Hq, D), k_cache (blocks, slots, Hk, D), token_types (B, max_len) -> two (B, max_len)."""
    blocks, slots, heads, dim = k_cache.shape
    batch, max_len = token_types.shape
    total, peak = np.zeros((batch, max_len)), np.zeros((batch, max_len))
    for b, (q0, q1) in enumerate(spans(cu_seqlens_q, len(q))):
        length = max(0, min(int(seq_lens[b]), max_len, block_table.shape[1] * slots))
        types = np.array(token_types[b, :length])
        k = np.zeros((length, heads, dim))
        for p in range(length):
            block = int(block_table[b, p // slots])
            if 0 <= block < blocks:
                k[p] = k_cache[block, p % slots]
            else:
                types[p] = PADDING
        part = None if lse is None else lse[:, q0:q1]
        total[b, :length], peak[b, :length] = scores(
            q[q0:q1].transpose(1, 0, 2), k.transpose(1, 0, 2), types, scale, part
        )
    return total, peak


# ---------------------------------------------------------------------------------------------- selection


def select_dual(total, peak, token_types, global_threshold, individual_threshold, protected=None, drop_multiple=1):
    """-> per sequence the kept positions, ascending. The product of threshold and sum is not rounded."""
    kept = []
    for b in range(len(total)):
        limit = float(np.float32(global_threshold)) * float(total[b].sum())
        single = float(np.float32(individual_threshold))
        drop = [
            j
            for j in range(total.shape[1])
            if token_types[b, j] == VISION
            and total[b, j] < limit
            and peak[b, j] < single
            and not (protected is not None and protected[b, j])
        ]
        kept.append(keep_all_but(drop, total[b], token_types[b], drop_multiple))
    return kept


def select_topk(scores, token_types, k, budgets=None, protected=None, drop_multiple=1):
    """-> per sequence the kept positions, ascending."""
    kept = []
    for b in range(len(scores)):
        room = k if budgets is None else max(0, int(budgets[b]))
        vision = [j for j in range(scores.shape[1]) if token_types[b, j] == VISION]
        first = [j for j in vision if protected is not None and protected[b, j]]
        rest = falling(scores[b], sorted(set(vision) - set(first)))
        drop = rest[max(0, room - len(first)) :]
        kept.append(keep_all_but(drop, scores[b], token_types[b], drop_multiple))
    return kept


def keep_all_but(drop: list[int], values: np.ndarray, types: np.ndarray, drop_multiple: int) -> list[int]:
    spare = falling(values, drop)[: len(drop) % drop_multiple]
    gone = set(drop) - set(spare)
    return [j for j in range(len(types)) if types[j] != PADDING and j not in gone]


def as_keep(kept: list[list[int]], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists as `keep` (B, capacity), padded with -1, and `counts` (B), which may exceed the capacity."""
    keep = np.full((len(kept), capacity), -1, dtype=np.int64)
    for b, positions in enumerate(kept):
        keep[b, : len(positions)] = positions[:capacity]
    return keep, np.array([len(p) for p in kept], dtype=np.int64)


# ---------------------------------------------------------------------------------------------- moves (on bytes)


def gather_tokens(x: np.ndarray, keep: np.ndarray, counts: np.ndarray, align_end: bool = False) -> np.ndarray:
    """x (B, L, bytes) uint8 -> (B, K, bytes)."""
    batch, width = keep.shape
    out = np.zeros((batch, width, x.shape[2]), dtype=np.uint8)
    for b in range(batch):
        n = max(0, min(int(counts[b]), width))
        for i in range(n):
            if 0 <= keep[b, i] < x.shape[1]:
                out[b, width - n + i if align_end else i] = x[b, keep[b, i]]
    return out


def moves(keep: np.ndarray, count: int, end: int, align_end: bool) -> list[tuple[int, int]]:
    """(source, destination) of one stream's moves; the caller skips those outside the tensor."""
    n = max(0, min(int(count), len(keep)))
    start = end - n if align_end else 0
    return [(int(keep[i]), start + i) for i in range(n)]


def compact_kv(cache: np.ndarray, keep: np.ndarray, counts: np.ndarray, align_end: bool) -> tuple:
    """cache (B, Hk, L, bytes), keep (B, K) or (B, Hk, K) -> (contents after the call, mask of specified slots)."""
    batch, heads, length, _ = cache.shape
    after, told = cache.copy(), np.zeros((batch, heads, length), dtype=bool)
    for b in range(batch):
        for h in range(heads):
            per_head = keep.ndim == 3
            stream, count = (keep[b, h], counts[b, h]) if per_head else (keep[b], counts[b])
            for src, dst in moves(stream, count, length, align_end):
                if 0 <= dst < length:
                    told[b, h, dst] = True
                    if 0 <= src < length:
                        after[b, h, dst] = cache[b, h, src]
    return after, told


def compact_paged_kv(
    cache: np.ndarray,
    block_table: np.ndarray,
    keep: np.ndarray,
    counts: np.ndarray,
    seq_lens: np.ndarray | None,
    align_end: bool,
) -> tuple:
    """cache (blocks, slots, Hk, bytes) -> (contents after the call, mask of specified slots).

    Only the vacated positions of listed blocks are unspecified: past `counts`, or before the aligned end. Blocks that
    no sequence lists, and positions past an aligned end, are unchanged.
    """
    blocks, slots, heads, _ = cache.shape
    batch, max_blocks = block_table.shape
    after, told = cache.copy(), np.ones((blocks, slots, heads), dtype=bool)

    def place(b: int, p: int) -> tuple[int, int] | None:
        if not 0 <= p < max_blocks * slots:
            return None
        block = int(block_table[b, p // slots])
        return (block, p % slots) if 0 <= block < blocks else None

    for b in range(batch):
        end = int(seq_lens[b]) if align_end else max_blocks * slots
        for p in range(min(end, max_blocks * slots)):
            spot = place(b, p)
            if spot is not None:
                told[spot] = False
        for h in range(heads):
            per_head = keep.ndim == 3
            stream, count = (keep[b, h], counts[b, h]) if per_head else (keep[b], counts[b])
            for src, dst in moves(stream, count, end, align_end):
                source, target = place(b, src), place(b, dst)
                if target is not None:
                    told[(*target, h)] = True
                    if source is not None:
                        after[(*target, h)] = cache[(*source, h)]
    return after, told
