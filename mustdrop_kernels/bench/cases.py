# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases: for each operator its inputs at a shape, their minimum work, and the form of its results.

The inputs are random with clear decisions, so that every correct computation makes the same ones in every dtype: half
of the windows are similar, and the text attends about seven times as much to ``keep`` of the vision tokens as to the
others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import TokenType
from .shapes import Shape

PAGE_SIZE = 16
PULL = 2.0  # added to the scores of the tokens that the text attends to
Raw = Any  # result of an implementation
Canonical = dict[str, Tensor]


@dataclasses.dataclass
class Inputs:
    """The arguments of an operator, and further ones of its baselines."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def clone(self) -> Inputs:
        """The same with memory of its own."""
        return Inputs(_clone(self.args), _clone(self.kwargs), _clone(self.extra))


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item) for item in value)
    return value


Make = Callable[[Shape, torch.dtype, torch.device], Inputs]


@dataclasses.dataclass(frozen=True)
class Work:
    """Minimum work: one read of the required inputs, one write of each result, and the operations."""

    read: int  # bytes
    written: int  # bytes
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Spec:
    """Generator of an operator's inputs, and reader of its results."""

    make: Make
    work: Callable[[Shape, int], Work]  # (shape, bytes of an element)
    canonical: Callable[[Raw, Inputs], Canonical]  # comparable form: no padding, raster order
    input_bytes: Callable[[Shape, int], int]
    in_place: bool = False
    moves: bool = False  # results are copies, so they are compared exactly
    # Further calls by name: keyword arguments from the inputs.
    variants: dict[str, Callable[[Inputs], dict[str, Any]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator at a shape in a dtype on a device."""

    op: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> Spec:
        """Of its operator."""
        return CASES[self.op]

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """All of it in words."""
        return f"{self.op} {self.shape.label} {self.dtype_name}"

    @property
    def work(self) -> Work:
        """The least that has to be done."""
        return self.spec.work(self.shape, self.dtype.itemsize)

    @property
    def input_bytes(self) -> int:
        """Size of the large inputs."""
        return self.spec.input_bytes(self.shape, self.dtype.itemsize)

    def inputs(self) -> Inputs:
        """The same values every time."""
        return self.spec.make(self.shape, self.dtype, self.device)


def _generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


# Stage 1


def _make_merge(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = _generator(device)
    (height, width), (h, w), c = shape.grid, shape.window, shape.channels
    batch, windows = shape.batch * shape.images, (height // h) * (width // w)
    base = torch.randn(batch, windows, 1, c, generator=g, device=device)
    similar = torch.rand(batch, windows, generator=g, device=device).argsort(-1) < windows // 2
    spread = torch.where(similar, 0.2, 4.0)[..., None, None]  # mean cosine 0.96 and 0.06
    x = base + spread * torch.randn(batch, windows, h * w, c, generator=g, device=device)
    # [B, H/h, W/w, h, w, C] -> [B, H/h, h, W/w, w, C]
    x = x.view(batch, height // h, width // w, h, w, c).transpose(2, 3).reshape(batch, height * width, c)
    x = torch.cat([torch.randn(batch, 1, c, generator=g, device=device), x], 1).to(dtype)
    return Inputs((x, list(shape.grid), list(shape.window), 0.8), {})


def _merge_work(shape: Shape, size: int) -> Work:
    batch, c = shape.batch * shape.images, shape.channels
    length = 1 + shape.patches
    # Out: tokens with their padding, assignment int64, sizes float32, counts int32.
    written = batch * (length * c * size + length * (8 + 4) + 4)
    return Work(batch * length * c * size, written, batch * shape.patches * c * 6)  # squares, scaling, sum; mean


def raster_windows(shape_grid: Sequence[int], window: Sequence[int], device: torch.device) -> Tensor:
    """[windows, n] patch numbers of each window, row by row."""
    (height, width), (h, w) = shape_grid, window
    patch = torch.arange(height * width, device=device).view(height // h, h, width // w, w)
    return patch.transpose(1, 2).reshape(-1, h * w)


def _canonical_merge(raw: Raw, inputs: Inputs) -> Canonical:
    """Prefix, merged windows by position, other tokens by position, without padding; and the merged windows."""
    tokens, counts, assignment, sizes = raw
    x, grid, window, _ = inputs.args
    members = raster_windows(grid, window, x.device)
    merged = assignment[:, 1 + members[:, 0]] == assignment[:, 1 + members[:, -1]]  # [B, windows]
    alone = torch.ones_like(assignment[:, 1:], dtype=torch.bool)
    alone[:, members] = ~merged[..., None].expand(-1, -1, members.shape[1])
    rows = [
        torch.cat([assignment[b, :1], assignment[b, 1 + members[merged[b], 0]], assignment[b, 1:][alone[b]]])
        for b in range(len(x))
    ]
    return {
        "tokens": torch.cat([tokens[b, row] for b, row in enumerate(rows)]),
        "merged": merged,
        "sizes": torch.cat([sizes[b, row] for b, row in enumerate(rows)]),
        "counts": counts.long(),
    }


def _make_cls(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = _generator(device)
    batch, heads = shape.batch * shape.images, shape.vision_heads
    dim = shape.channels // heads
    q = _normal((batch, heads, 1 + shape.patches, dim), dtype, g)  # all rows: baselines that build the matrix use them
    k = _normal((batch, heads, 1 + shape.patches, dim), dtype, g)
    return Inputs((q[:, :, 0], k, dim**-0.5), {}, {"q": q})


def _cls_work(shape: Shape, size: int) -> Work:
    batch, length = shape.batch * shape.images, 1 + shape.patches
    return Work(batch * (length + 1) * shape.channels * size, 4 * batch * length, 2 * batch * length * shape.channels)


# Stage 2


def token_types(shape: Shape, device: torch.device) -> Tensor:
    """(B, L) uint8: text, vision, text queries."""
    types = torch.tensor([1] * shape.text_before + [2] * shape.vision + [3] * shape.queries, dtype=torch.uint8)
    return types.to(device).expand(shape.batch, -1).contiguous()


def _looked_at(shape: Shape, g: torch.Generator) -> Tensor:
    """(B, vision) bool, ``keep`` of them in each sequence."""
    return torch.rand(shape.batch, shape.vision, generator=g, device=g.device).argsort(-1) < shape.keep


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Hq, L, D), k (B, Hk, L, D), token types. Text rows and the tokens that they attend to share a direction."""
    g = _generator(device)
    b, length, d, group = shape.batch, shape.length, shape.head_dim, shape.heads // shape.kv_heads
    towards = torch.nn.functional.normalize(torch.randn(shape.kv_heads, 1, d, generator=g, device=device), dim=-1)
    towards = towards * math.sqrt(PULL * math.sqrt(d))
    q = torch.randn(b, shape.heads, length, d, generator=g, device=device)
    q[:, :, -shape.queries :] += towards.repeat_interleave(group, 0)
    k = torch.randn(b, shape.kv_heads, length, d, generator=g, device=device)
    vision = slice(shape.text_before, shape.text_before + shape.vision)
    k[:, :, vision] += towards * _looked_at(shape, g)[:, None, :, None]
    return q.to(dtype), k.to(dtype), token_types(shape, device)


def _lse(q: Tensor, k: Tensor, queries: int, scale: float) -> Tensor:
    """(B, Hq, L) float32 normalisers of the text rows, a head at a time."""
    heads, length = q.shape[1], k.shape[2]
    lse = q.new_zeros(*q.shape[:3], dtype=torch.float32)
    column = torch.arange(length, device=q.device)
    hidden = column > column[-queries:, None]
    for h in range(heads):
        key = k[:, h * k.shape[1] // heads].float()
        scores = scale * q[:, h, -queries:].float() @ key.transpose(-1, -2)
        lse[:, h, -queries:] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    return lse


def _make_scores(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    q, k, types = _attention(shape, dtype, device)
    scale = shape.head_dim**-0.5
    return Inputs((q, k, types, scale), {}, {"shape": shape, "lse": _lse(q, k, shape.queries, scale)})


def _scores_work(shape: Shape, size: int) -> Work:
    b, d, length = shape.batch, shape.head_dim, shape.length
    read = (shape.heads * shape.queries + shape.kv_heads * length) * d * size + length
    return Work(b * read, 8 * b * length, 2 * b * shape.heads * shape.queries * length * d)


def _scores_input(shape: Shape, size: int) -> int:
    return shape.batch * shape.length * (shape.heads + shape.kv_heads) * shape.head_dim * size


def _two(raw: Raw, inputs: Inputs) -> Canonical:
    return {"total": raw[0], "peak": raw[1]}


def _packed_rows(q: Tensor, shape: Shape) -> Tensor:
    """(B * queries, Hq, D): the text rows of all sequences."""
    return q[:, :, -shape.queries :].transpose(1, 2).reshape(-1, shape.heads, shape.head_dim)


def _make_varlen(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    q, k, types = _attention(shape, dtype, device)
    ends = torch.arange(shape.batch + 1, device=device, dtype=torch.int32)
    rows = shape.queries
    packed_k = k.transpose(1, 2).reshape(-1, shape.kv_heads, shape.head_dim)
    args = (_packed_rows(q, shape), packed_k, types.view(-1), ends * rows, ends * shape.length, rows, shape.length)
    return Inputs((*args, shape.head_dim**-0.5), {}, {"shape": shape})


def _block_table(shape: Shape, device: torch.device) -> Tensor:
    """(B, max_blocks) int32: the sequences' pages, scattered over the pool."""
    pages = -(-shape.length // PAGE_SIZE)
    order = torch.randperm(shape.batch * pages, generator=_generator(device, 1), device=device)
    return order.int().view(shape.batch, pages)


def _make_paged(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    q, k, types = _attention(shape, dtype, device)
    table = _block_table(shape, device)
    cache = k.new_zeros(table.numel(), PAGE_SIZE, shape.kv_heads, shape.head_dim)
    position = torch.arange(shape.length, device=device)
    cache[table.long()[:, position // PAGE_SIZE], position % PAGE_SIZE] = k.transpose(1, 2)
    rows = shape.queries
    ends = torch.arange(shape.batch + 1, device=device, dtype=torch.int32) * rows
    seq_lens = torch.full((shape.batch,), shape.length, device=device, dtype=torch.int32)
    args = (_packed_rows(q, shape), cache, table, seq_lens, types, ends, rows, shape.head_dim**-0.5)
    return Inputs(args, {}, {"shape": shape})


def _packed_input(shape: Shape, size: int) -> int:
    rows = shape.queries * shape.heads + shape.length * shape.kv_heads
    return shape.batch * rows * shape.head_dim * size


def _attending(arguments: Callable[[Shape], tuple[float, ...]]) -> Make:
    """Inputs of an operator that takes q, k, token types, the scale, and these arguments."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        q, k, types = _attention(shape, dtype, device)
        return Inputs((q, k, types, shape.head_dim**-0.5, *arguments(shape)), {}, {"shape": shape})

    return make


def _map_work(shape: Shape, size: int) -> Work:
    scores = _scores_work(shape, size)
    return dataclasses.replace(scores, written=4 * shape.batch * shape.length * shape.queries)


def thresholds(shape: Shape) -> tuple[float, float]:
    """(global, individual): between tokens that are attended to and the others."""
    # A token has the share 1 / (vision + keep (e^PULL - 1)), one that is attended to e^PULL times as much.
    low = 1 / (shape.vision + shape.keep * math.expm1(PULL))
    return low * math.exp(PULL / 2), 4 * low


def _make_select_scores(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """total, peak, token types, similar to scores."""
    g = _generator(device)
    types = token_types(shape, device)
    low = 1 / (shape.vision + shape.keep * math.expm1(PULL))
    share = low * torch.where(_looked_at(shape, g), math.exp(PULL), 1.0)
    share = share * (0.9 + 0.2 * torch.rand(share.shape, generator=g, device=device))
    total = torch.zeros(types.shape, device=device)
    total[:, shape.text_before : shape.text_before + shape.vision] = shape.queries * share
    return total, 2 * total / shape.queries, types


def _make_select_dual(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    total, peak, types = _make_select_scores(shape, device)
    chance = torch.rand(types.shape, generator=_generator(device, 2), device=device)
    protected = (chance < 0.08) & (types == TokenType.VISION)  # the key set
    return Inputs((total, peak, types, *thresholds(shape)), {"protected": protected}, {"shape": shape})


def _make_select_topk(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    total, _, types = _make_select_scores(shape, device)
    return Inputs((total, types, shape.keep), {}, {"shape": shape})


def _canonical_select(raw: Raw, inputs: Inputs) -> Canonical:
    """The positions that stay, sequence after sequence."""
    keep, counts = raw[0], raw[1]
    kept = [row[:n] for row, n in zip(keep, counts.tolist(), strict=True)]
    scores = {"total": raw[2], "peak": raw[3]} if len(raw) == 4 else {}
    return {"keep": torch.cat(kept), "counts": counts.long(), **scores}


def _fused_work(shape: Shape, size: int) -> Work:
    scores = _scores_work(shape, size)
    return dataclasses.replace(scores, written=scores.written + 8 * shape.batch * shape.length)


# Stage 3


def _keep(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """keep (B, kept) int64 ascending, counts (B) int32: all text and the tokens that are attended to."""
    stays = token_types(shape, device) != 2
    vision = slice(shape.text_before, shape.text_before + shape.vision)
    stays[:, vision] = _looked_at(shape, _generator(device))
    keep = stays.nonzero()[:, 1].view(shape.batch, shape.kept)
    return keep, torch.full((shape.batch,), shape.kept, dtype=torch.int32, device=device)


def _make_gather(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x = _normal((shape.batch, shape.length, shape.hidden), dtype, _generator(device))
    return Inputs((x, *_keep(shape, device)), {}, {"shape": shape})


def _layers(size: Sequence[int], layers: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Different values in each layer, derived from one random tensor: more would take longer than the timing."""
    drawn = torch.randn(*size, generator=_generator(device), device=device)
    return [(drawn * (1 + i / layers)).to(dtype) for i in range(layers)]


def _make_compact(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    size = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
    both = _layers(size, 2 * shape.layers, dtype, device)
    keep, counts = _keep(shape, device)
    return Inputs((both[::2], both[1::2], [keep], [counts]), {}, {"shape": shape})


def canonical_compact(raw: Raw, inputs: Inputs) -> Canonical:
    """A baseline returns the new keys and values; an operator returns None and has changed its inputs."""
    if raw is None:
        n = inputs.args[2][0].shape[1]
        raw = [[t[:, :, :n] for t in inputs.args[0]], [t[:, :, :n] for t in inputs.args[1]]]
    return {f"{name} {i}": t for name, side in zip(("keys", "values"), raw, strict=True) for i, t in enumerate(side)}


def _make_compact_paged(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    table = _block_table(shape, device)
    both = _layers((table.numel(), PAGE_SIZE, shape.kv_heads, shape.head_dim), 2 * shape.layers, dtype, device)
    keep, counts = _keep(shape, device)
    return Inputs((both[::2], both[1::2], table, [keep], [counts]), {}, {"shape": shape})


def canonical_compact_paged(raw: Raw, inputs: Inputs) -> Canonical:
    """The kept slots of the caches, which have been changed in place."""
    keys, values, table, keep, _ = inputs.args
    position = torch.arange(keep[0].shape[1], device=table.device)
    block, slot = table.long()[:, position // PAGE_SIZE], position % PAGE_SIZE
    sides = (("keys", keys), ("values", values))
    return {f"{name} {i}": cache[block, slot] for name, side in sides for i, cache in enumerate(side)}


def _moved(shape: Shape) -> int:
    """Number of tokens that move: those after the first dropped one."""
    return shape.kept - shape.text_before


def _compact_work(shape: Shape, size: int) -> Work:
    moved = 2 * shape.layers * shape.batch * shape.kv_heads * shape.head_dim * size * _moved(shape)
    return Work(moved, moved)


def _compact_input(shape: Shape, size: int) -> int:
    return 2 * shape.layers * shape.batch * shape.kv_heads * shape.length * shape.head_dim * size


def only(name: str) -> Callable[[Raw, Inputs], Canonical]:
    """``canonical`` of an operator, or a baseline, with this one result."""
    return lambda raw, inputs: {name: raw}


_WITH_LSE: dict[str, Callable[[Inputs], dict[str, Any]]] = {"lse given": lambda inputs: {"lse": inputs.extra["lse"]}}
_AS_PUBLISHED: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "as published": lambda inputs: {"uniform": True, "merged_first": True}
}

CASES: dict[str, Spec] = {
    "spatial_merge": Spec(
        _make_merge, _merge_work, _canonical_merge,
        lambda s, size: s.batch * s.images * (1 + s.patches) * s.channels * size, variants=_AS_PUBLISHED,
    ),
    "cls_attention": Spec(
        _make_cls, _cls_work, only("attention"),
        lambda s, size: 2 * s.batch * s.images * (1 + s.patches) * s.channels * size,
    ),
    "text_vision_scores": Spec(_make_scores, _scores_work, _two, _scores_input, variants=_WITH_LSE),
    "text_vision_scores_varlen": Spec(_make_varlen, _scores_work, _two, _packed_input),
    "text_vision_scores_paged": Spec(_make_paged, _scores_work, _two, _packed_input),
    "text_vision_attention": Spec(_attending(lambda s: (s.queries,)), _map_work, only("attention"), _scores_input),
    "select_dual": Spec(
        _make_select_dual, lambda s, size: Work(s.batch * s.length * (4 + 4 + 1 + 1), s.batch * s.length * 8),
        _canonical_select,
        lambda s, size: s.batch * s.length * 10,
    ),
    "select_topk": Spec(
        _make_select_topk, lambda s, size: Work(s.batch * s.length * (4 + 1), s.batch * s.length * 8),
        _canonical_select,
        lambda s, size: s.batch * s.length * 5,
    ),
    "dual_attention_select": Spec(_attending(thresholds), _fused_work, _canonical_select, _scores_input),
    "topk_attention_select": Spec(_attending(lambda s: (s.keep,)), _fused_work, _canonical_select, _scores_input),
    "gather_tokens": Spec(
        _make_gather, lambda s, size: Work(*[s.batch * s.kept * s.hidden * size] * 2), only("tokens"),
        lambda s, size: s.batch * s.length * s.hidden * size, moves=True,
    ),
    "compact_kv_": Spec(_make_compact, _compact_work, canonical_compact, _compact_input, in_place=True, moves=True),
    "compact_paged_kv_": Spec(
        _make_compact_paged, _compact_work, canonical_compact_paged, _compact_input, in_place=True, moves=True
    ),
}  # fmt: skip
# Their time does not depend on the dtype of the model: scores are float32.
FLOAT32_ONLY = ("select_dual", "select_topk")
