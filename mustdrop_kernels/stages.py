# SPDX-License-Identifier: Apache-2.0
"""The three stages of MustDrop (arXiv 2411.10803) on tensors, without model code.

Stage 1: ``merge_vision_tokens`` after an early vision layer, ``key_tokens`` from the CLS attention of the last one.
Stage 2: ``token_types`` and a ``Tokens`` for the prompt; after each pruning layer ``prune``, or ``select`` with scores
of another layout, then ``Tokens.take``.
Stage 3: ``evict`` cuts the KV cache of earlier layers to the surviving tokens.

With budgets nothing here synchronizes with the device. With thresholds ``select`` synchronizes once, for the counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .config import MustDropConfig
from .ops import TokenType
from .parallel import mean_over_ranks

# ---------------------------------------------------------------------------------------------- stage 1: vision


def merge_vision_tokens(
    x: Tensor,  # (B, P+N, C)
    grid: Sequence[int],
    config: MustDropConfig,
    *,
    num_prefix_tokens: int = 1,
) -> ops.SpatialMerge:
    """Merges windows of similar patches. With ``config.merge_budget`` the length of the result is static.

    With published positions merged windows come first, and the order of the tokens gives their positions. With a budget
    the patches outside of whole windows come last; they do not merge.
    """
    merge = partial(
        ops.spatial_merge, num_prefix_tokens=num_prefix_tokens, merged_first=config.positions == "published",
        backend=config.backend,
    )  # fmt: skip
    if config.merge_budget is None:
        return merge(x, grid, config.window, config.merge_threshold, uniform=config.merge_uniform)
    whole, count = whole_windows(grid, config.window)
    budget = config.merged_windows(count)
    if not count:
        return merge(x, grid, [1] * len(whole), budget=0)
    if whole == list(grid):
        return merge(x, grid, config.window, budget=budget)
    inside = torch.zeros(tuple(grid), dtype=torch.bool, device=x.device)
    inside[tuple(slice(side) for side in whole)] = True
    place = torch.arange(x.shape[1], device=x.device)
    is_member = torch.cat([place[:num_prefix_tokens] >= 0, inside.flatten()])
    # As many members and others as the sizes say, so that nothing synchronizes with the device.
    members = num_prefix_tokens + math.prod(whole)
    order = torch.argsort(~is_member, stable=True)
    chosen, others = order[:members], order[members:]
    part = merge(x[:, chosen], whole, config.window, budget=budget)
    length, rest = part.tokens.shape[1], place[: len(others)].expand(len(x), -1)
    assignment = part.assignment.new_empty(x.shape[:2])
    assignment[:, chosen], assignment[:, others] = part.assignment, length + rest
    return ops.SpatialMerge(
        torch.cat([part.tokens, x[:, others]], 1),
        part.counts + len(others),
        assignment,
        torch.cat([part.sizes, part.sizes.new_ones(rest.shape)], 1),
    )


def whole_windows(grid: Sequence[int], window: Sequence[int]) -> tuple[list[int], int]:
    """The part of a grid, from the origin, that whole windows tile, and the number of those windows."""
    counts = [side // length for side, length in zip(grid, window, strict=True)]
    return [count * length for count, length in zip(counts, window, strict=True)], math.prod(counts)


def key_tokens(
    query: Tensor,  # (B, H, D) of the CLS token
    key: Tensor,  # (B, H, S, D) of prefix, tokens and padding
    scale: float,
    config: MustDropConfig,
    *,
    counts: Tensor | None = None,  # (B) real tokens of S, prefix included; None: all
    num_prefix_tokens: int = 1,
    group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: no others
) -> Tensor:  # (B, S) bool
    """The tokens that the CLS token attends to most: ceil(key_rate * N) of the N tokens of each image.

    For images of one tile. The tiles of a larger image share its number of key tokens: pass the ``cls_attention`` of
    all of them to ``select_key_tokens``.
    """
    batch, _, length, _ = key.shape
    attention = cls_attention(
        query, key, scale, config, counts=counts, num_prefix_tokens=num_prefix_tokens, group=group
    )
    place = torch.arange(length, device=key.device).expand(batch, length)
    vision = place >= num_prefix_tokens
    if counts is not None:
        vision = vision & (place < counts[:, None])
    return select_key_tokens(attention, vision, config)


def cls_attention(
    query: Tensor,  # (B, H, D) of the CLS token
    key: Tensor,  # (B, H, S, D)
    scale: float,
    config: MustDropConfig,
    *,
    counts: Tensor | None = None,  # (B) real tokens of S, prefix included; None: all
    num_prefix_tokens: int = 1,
    group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: no others
) -> Tensor:  # (B, S) float32, zero for prefix and padding
    """Attention of the CLS token, mean over heads: the importance of tokens in a tower with a CLS token.

    With a group one all-reduce of B * S float32 numbers averages over the ranks.
    """
    found = ops.cls_attention(
        query.detach(), key.detach(), scale, counts=counts, num_prefix_tokens=num_prefix_tokens, backend=config.backend
    )
    return found if group is None else mean_over_ranks(found, group)


_ROWS = 1 << 22  # attention values that `received_attention` holds at once


def received_attention(
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, H, S, D)
    scale: float,
    config: MustDropConfig,
    *,
    counts: Tensor | None = None,  # (B) real tokens of S; None: all
) -> Tensor:  # (B, S) float32, zero for padding
    """Attention that each token receives, mean over queries and heads: the importance of tokens without a CLS token.

    r[j] = mean over i and heads of softmax_j(scale q_i . k_j). Each token is the query of ``cls_attention`` once, so
    that no attention matrix per head is built.
    """
    batch, _, length, _ = key.shape
    chunk = max(1, _ROWS // max(length, 1))
    real = torch.full((batch,), length, dtype=torch.int32, device=key.device) if counts is None else counts
    received = torch.zeros(batch, length, dtype=torch.float32, device=key.device)
    for image in range(batch):
        for begin in range(0, length, chunk):
            rows = query[image, :, begin : begin + chunk].transpose(0, 1)  # (R, H, D)
            same = key[image].expand(len(rows), *key.shape[1:])
            count = real[image].expand(len(rows)).contiguous()
            attention = cls_attention(rows, same, scale, config, counts=count, num_prefix_tokens=0)
            real_query = torch.arange(begin, begin + len(rows), device=key.device) < count
            received[image] += (attention * real_query[:, None]).sum(0)
    return received / real[:, None].clamp(min=1)


def select_key_tokens(
    importance: Tensor,  # (B, S) float32
    vision: Tensor,  # (B, S) bool, tokens of the image
    config: MustDropConfig,
) -> Tensor:  # (B, S) bool
    """The ceil(key_rate * N) most important of the N tokens of each image. Does not synchronize with the device."""
    batch, length = vision.shape
    types = torch.where(vision, int(TokenType.VISION), int(TokenType.PADDING)).to(torch.uint8)
    budgets = (config.key_rate * vision.sum(1).double()).ceil().int()
    keep, _ = ops.select_topk(importance, types, length, budgets=budgets, backend=config.backend)
    kept = torch.zeros(batch, length + 1, dtype=torch.bool, device=vision.device)
    kept.scatter_(1, torch.where(keep < 0, length, keep), True)  # the last column takes entries past the counts
    return kept[:, :length]


# --------------------------------------------------------------------------------------------- stage 2: prefill


def token_types(
    vision: Tensor,  # (B, L) bool
    attention_mask: Tensor | None,  # (B, L), nonzero where there is a token; None: everywhere
    text_queries: str,  # as ``MustDropConfig.text_queries``
) -> Tensor:  # (B, L) uint8
    """Token type of each position of a prompt. Sequences without an image have no text queries.

    With "last" the last token of a sequence is the query, a vision token too: it is never dropped then. With
    "after_image" a sequence that ends with its image has no query.
    """
    place = torch.arange(vision.shape[1], device=vision.device)
    real = torch.ones_like(vision) if attention_mask is None else attention_mask.bool()
    last_vision = torch.where(vision & real, place, -1).amax(1, keepdim=True)
    query = last_tokens(real) if text_queries == "last" else place > last_vision
    types = torch.where(vision, int(TokenType.VISION), int(TokenType.TEXT))
    types = types.masked_fill(query & (last_vision >= 0), int(TokenType.QUERY))
    return types.masked_fill(~real, int(TokenType.PADDING)).to(torch.uint8)


def last_tokens(real: Tensor) -> Tensor:  # (B, L) bool -> (B, L) bool
    """The last real token of each sequence."""
    place = torch.arange(real.shape[1], device=real.device)
    return real & (place == torch.where(real, place, -1).amax(1, keepdim=True))


class Pruned(NamedTuple):
    """The tokens that remain after a pruning layer."""

    keep: Tensor  # (B, max(lengths)) int64, ascending, -1 past counts
    counts: Tensor  # (B) int32
    lengths: tuple[int, ...]  # counts on the host

    def take(self, x: Tensor, *, backend: str | None = None) -> Tensor:  # (B, L, ...) -> (B, max(lengths), ...)
        """The remaining rows, padded on the left."""
        return ops.gather_tokens(x, self.keep, self.counts, align_end=True, backend=backend)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a batch at one point of the prefill: their types and their places in the plain prompt.

    Sequences of different length are padded on the left, so that the last token of each is in the last column.
    """

    types: Tensor  # (B, L) uint8
    index: Tensor  # (B, L) int64, place in the plain prompt; -1 in padding, so that each row ascends
    positions: Tensor  # (B, L) int64, RoPE positions
    protected: Tensor  # (B, L) bool, key tokens
    counts: Tensor  # (B) int32
    lengths: tuple[int, ...]  # counts on the host
    vision_token_counts: tuple[int, ...]
    key_token_counts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Length of the batch, padding included."""
        return self.types.shape[1]

    @property
    def padded(self) -> bool:
        """Whether some sequence is shorter than the batch."""
        return min(self.lengths) < self.length

    def take(self, pruned: Pruned, *, renumber: bool = False, backend: str | None = None) -> Tokens:
        """The remaining tokens, with their positions, or renumbered 0, 1, 2, ... in each sequence."""

        gather = partial(pruned.take, backend=backend)

        types, positions = gather(self.types), gather(self.positions)
        real = types != TokenType.PADDING
        if renumber:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        dropped = (before - after for before, after in zip(self.lengths, pruned.lengths, strict=True))
        return Tokens(
            types=types,
            index=gather(self.index).masked_fill(~real, -1),
            positions=positions,
            protected=gather(self.protected),
            counts=pruned.counts,
            lengths=pruned.lengths,
            vision_token_counts=tuple(
                before - count for before, count in zip(self.vision_token_counts, dropped, strict=True)
            ),
            key_token_counts=self.key_token_counts,
        )

    def slots(self, survivors: Tokens) -> Tensor:  # (B, survivors.length) int64, ascending up to survivors.counts
        """Place of each survivor among these tokens."""
        index = survivors.index
        if survivors.padded:  # the operator requires the real entries first
            shift = survivors.length - survivors.counts[:, None].long()
            place = torch.arange(survivors.length, device=index.device)
            index = index.gather(1, (place + shift).clamp(max=survivors.length - 1))
        return torch.searchsorted(self.index, index)


def prune(
    query: Tensor,  # (B, Hq, L, D) after RoPE
    key: Tensor,  # (B, Hk, L, D) after RoPE
    tokens: Tokens,
    scale: float,
    config: MustDropConfig,
    stage: int,
    *,
    lse: Tensor | None = None,  # (B, Hq, L) float32, of the scaled scores' rows; None: computed
) -> Pruned:
    """The tokens that remain after pruning layer number `stage`, from the queries and keys of that layer.

    The selection is discrete and has no gradient.
    """
    query, key = query.detach(), key.detach()
    scores = ops.text_vision_scores(query, key, tokens.types, scale, lse=lse, backend=config.backend)
    return select(scores, tokens, config, stage)


def masked_scores(
    query: Tensor,  # (B, Hq, L, D) after RoPE
    key: Tensor,  # (B, Hk, P+L, D) after RoPE
    types: Tensor,  # (B, P+L) uint8
    scale: float,
    mask: Tensor,  # (B, Hq or 1, L, P+L): True where a query attends, or added to its scores
    *,
    group: dist.ProcessGroup | None = None,  # the ranks that share the heads; None: no others
) -> ops.Scores:  # (B, P+L) float32 each
    """``ops.text_vision_scores`` with an attention mask other than the causal one, sequence by sequence.

    P[h,t,j] = softmax_j(scale q_t . k_j + mask_tj); total and peak are the sum and the maximum over text queries t of
    the mean over heads, zero where j is no vision token.
    """
    batch, heads, length, _ = query.shape
    found = []
    for row in range(batch):
        rows = (types[row, -length:] == TokenType.QUERY).nonzero()[:, 0]  # synchronizes with the device
        own = mask[row][:, rows].float() if mask.is_floating_point() else mask[row][:, rows]
        keys = key[row].repeat_interleave(heads // key.shape[1], 0).float()
        scores = scale * query[row][:, rows].float() @ keys.transpose(1, 2)  # (Hq, T, P+L)
        scores = scores + own if own.is_floating_point() else scores.masked_fill(~own, -torch.inf)
        attention = scores.softmax(-1).mean(0)
        attention = attention if group is None else mean_over_ranks(attention, group)
        attention = attention.nan_to_num(0.0).masked_fill(types[row] != TokenType.VISION, 0.0)
        peak = attention.amax(0) if len(rows) else attention.new_zeros(types.shape[1])
        found.append((attention.sum(0), peak))
    total, peak = (torch.stack(column) for column in zip(*found, strict=True))
    return ops.Scores(total, peak)


def select(scores: ops.Scores, tokens: Tokens, config: MustDropConfig, stage: int) -> Pruned:  # scores: (B, L) each
    """The tokens that remain after pruning layer number `stage`, from the scores.

    With thresholds the new lengths depend on the data, and one synchronization with the device reads them. With budgets
    they are known on the host.
    """
    total, peak = scores
    if config.budgets is None:
        thresholds = (config.global_threshold, config.individual_threshold)
        keep, counts = ops.select_dual(
            total, peak, tokens.types, *thresholds, protected=tokens.protected, backend=config.backend
        )
        lengths = tuple(counts.tolist())
        return Pruned(keep[:, : max(lengths)], counts, lengths)
    budget = config.budgets[stage]
    lengths = _lengths_by_budget(tokens, budget)
    keep, counts = ops.select_topk(
        total,
        tokens.types,
        budget,
        protected=tokens.protected,
        capacity=max(lengths),
        backend=config.backend,
    )
    return Pruned(keep, counts, lengths)


def _lengths_by_budget(tokens: Tokens, budget: int) -> tuple[int, ...]:
    """Length of each sequence after a cut to a budget, known on the host."""
    rows = zip(tokens.lengths, tokens.vision_token_counts, tokens.key_token_counts, strict=True)
    return tuple(length - vision + min(vision, max(budget, keys)) for length, vision, keys in rows)


def drop_empty(
    tokens: Tokens,
    empty: Tensor,  # (B, L) bool
    lengths: tuple[int, ...],  # remaining tokens of each sequence
    *,
    backend: str | None = None,
) -> Pruned:
    """The tokens that remain without the placeholders that hold no token after stage 1."""
    types = tokens.types.masked_fill(empty, int(TokenType.PADDING))
    scores = torch.zeros_like(types, dtype=torch.float32)
    keep, counts = ops.select_topk(scores, types, types.shape[1], capacity=max(lengths), backend=backend)
    return Pruned(keep, counts, lengths)


# ---------------------------------------------------------------------------------------------- stage 3: decode


def slots_of(cached: Sequence[Tokens], survivors: Tokens) -> list[Tensor]:
    """``Tokens.slots`` per layer; layers that hold the same tokens share one tensor."""
    slots = {id(tokens): tokens.slots(survivors) for tokens in cached}
    return [slots[id(tokens)] for tokens in cached]


def evict(
    keys: Sequence[Tensor],  # per layer (B, Hk, L_i, D)
    values: Sequence[Tensor],  # per layer (B, Hk, L_i, D)
    cached: Sequence[Tokens],  # per layer: the tokens of these keys and values, left-padded to L_i
    survivors: Tokens,
    *,
    align_end: bool = True,
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor]]:  # per layer views (B, Hk, survivors.length, D) of the same memory
    """Cuts the cache of each layer, in place, to the surviving tokens; all layers in one launch.

    The tokens move to the end of each cache or, with `align_end` False, to its beginning.
    """
    keep = slots_of(cached, survivors)
    with torch.no_grad():
        ops.compact_kv_(keys, values, keep, [survivors.counts] * len(cached), align_end=align_end, backend=backend)
    width = survivors.length
    part = lambda x: x.narrow(2, x.shape[2] - width if align_end else 0, width)  # noqa: E731
    return [(part(key), part(value)) for key, value in zip(keys, values, strict=True)]
