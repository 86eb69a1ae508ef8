# SPDX-License-Identifier: Apache-2.0
"""Baselines of the attention scores: the whole matrix, only the rows of text, and kernels of other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from ..cases import PAGE_SIZE, Case, Inputs, Raw, only
from ..shapes import Shape
from .base import Baseline, Call, as_pair, compiled, for_case


def _repeat(k: Tensor, heads: int) -> Tensor:
    """[B, Hk, L, D] -> [B, Hq, L, D]: each key head for its group of query heads."""
    group = heads // k.shape[1]
    return k if group == 1 else k.repeat_interleave(group, 1)


def _vision(shape: Shape) -> slice:
    return slice(shape.text_before, shape.text_before + shape.vision)


def whole_matrix(q: Tensor, k: Tensor, shape: Shape, scale: float, mask_device: torch.device) -> Tensor:
    """Head mean [B, rows of text, vision], cut out of the attention of all L x L pairs."""
    length = q.shape[2]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float32, device=mask_device).triu(1)
    mask = mask.to(q.device, q.dtype)
    scores = q @ _repeat(k, q.shape[1]).transpose(-1, -2) * scale + mask
    attention = scores.softmax(-1, dtype=torch.float32).to(q.dtype).mean(1)
    return attention[:, -shape.queries :, _vision(shape)]


def text_rows(q: Tensor, k: Tensor, shape: Shape, scale: float) -> Tensor:
    """The same, computed for the text rows only; q is (B, Hq, rows, D)."""
    rows, length = q.shape[2], k.shape[2]
    scores = q @ _repeat(k, q.shape[1]).transpose(-1, -2) * scale
    column = torch.arange(length, device=q.device)
    scores = scores.masked_fill(column > column[-rows:, None], -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).mean(1)[..., _vision(shape)]


def reduce_rows(attention: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """total and peak [B, L] of a map [B, rows, vision]."""
    return _padded(attention.sum(1), shape), _padded(attention.amax(1), shape)


def _padded(vision: Tensor, shape: Shape) -> Tensor:
    """[..., vision] -> [..., L] float32, zero at text."""
    return F.pad(vision.float(), (shape.text_before, shape.queries))


def _whole(mask_on_host: bool) -> Callable[[Case], Call]:
    def compute(case: Case, inputs: Inputs) -> Raw:
        q, k, _, scale = inputs.args[:4]
        mask_device = torch.device("cpu") if mask_on_host else case.device
        return reduce_rows(whole_matrix(q, k, case.shape, scale, mask_device), case.shape)

    return for_case(compute)


@for_case
def _text_rows(case: Case, inputs: Inputs) -> Raw:
    shape = case.shape
    q, k, _, scale = inputs.args[:4]
    return reduce_rows(text_rows(q[:, :, -shape.queries :], k, shape, scale), shape)


@for_case
def _whole_map(case: Case, inputs: Inputs) -> Raw:
    q, k, _, scale = inputs.args[:4]
    return _padded(whole_matrix(q, k, case.shape, scale, case.device), case.shape)


@for_case
def _text_rows_map(case: Case, inputs: Inputs) -> Raw:
    shape = case.shape
    q, k, _, scale = inputs.args[:4]
    return _padded(text_rows(q[:, :, -shape.queries :], k, shape, scale), shape)


def _sequence_by_sequence(
    shape: Shape, q: Tensor, scale: float, keys: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """total and peak [B, L] from packed rows and the keys [L, Hk, D] of each sequence."""
    results = []
    for b in range(shape.batch):
        rows = q[b * shape.queries : (b + 1) * shape.queries].transpose(0, 1)[None]
        results.append(reduce_rows(text_rows(rows, keys(b).transpose(0, 1)[None], shape, scale), shape))
    total, peak = zip(*results, strict=True)
    return torch.cat(total), torch.cat(peak)


@for_case
def _text_rows_packed(case: Case, inputs: Inputs) -> Raw:
    """Sequence by sequence, as code without a packed kernel does."""
    length, k = case.shape.length, inputs.args[1]
    found = _sequence_by_sequence(
        case.shape, inputs.args[0], inputs.args[-1], lambda b: k[b * length : (b + 1) * length]
    )
    return found[0].flatten(), found[1].flatten()


@for_case
def _text_rows_paged(case: Case, inputs: Inputs) -> Raw:
    q, cache, table = inputs.args[:3]

    def keys(b: int) -> Tensor:
        return cache.index_select(0, table[b]).flatten(0, 1)[: case.shape.length]

    return _sequence_by_sequence(case.shape, q, inputs.args[-1], keys)


@for_case
def _sdpa(case: Case, inputs: Inputs) -> Raw:
    """The keys serve as values, whose contents do not affect the time."""
    q, k = inputs.args[0], inputs.args[1]
    return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


def sdpa_kernel(inputs: Inputs) -> str:
    """The kernel that scaled_dot_product_attention chooses for the call of ``_sdpa``, such as "FLASH_ATTENTION"."""
    q, k = inputs.args[0], inputs.args[1]
    chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return torch.nn.attention.SDPBackend(chosen).name


def flex_total(compile_it: bool = True) -> Callable[[Case], Call]:
    """FlexAttention with the roles of q and k swapped: log sum_t exp(s[t, j] - lse[t]) is its normaliser of row j."""

    def build(case: Case) -> Call:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        shape = case.shape
        torch_flex: Any = flex_attention
        first = shape.length - shape.queries
        if compile_it:
            torch._dynamo.reset()
            torch_flex = torch.compile(flex_attention, dynamic=False)

        def call(inputs: Inputs) -> Raw:
            q, k, _, scale = inputs.args[:4]
            lse = inputs.extra["lse"][:, :, first:]

            def weight(score: Tensor, b: Tensor, h: Tensor, key: Tensor, row: Tensor) -> Tensor:
                return torch.where(key <= first + row, score - lse[b, h, row], -torch.inf)

            rows = q[:, :, first:]
            _, aux = torch_flex(
                _repeat(k, q.shape[1]), rows, rows, score_mod=weight, scale=scale, return_aux=AuxRequest(lse=True)
            )
            return _padded(aux.lse[..., _vision(shape)].exp().mean(1), shape)

        return call

    return build


def _why_no_flex(case: Case) -> str | None:
    if case.device.type == "cpu":
        return "compiled FlexAttention returns no lse on a CPU, and the lse is the result here"
    return None


def _package(name: str) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        if case.device.type != "cuda":
            return "it needs a CUDA GPU"
        if importlib.util.find_spec(name) is None:
            return f"not installed: pip install {name.replace('_', '-')}"
        if name == "flash_colsum" and case.shape.batch > 1:
            return "its causal kernel takes a batch of 1"
        if name == "flash_colsum" and case.shape.heads != case.shape.kv_heads:
            return "its causal kernel needs as many key heads as query heads"
        return None

    return why_not


def _colreduce(case: Case) -> Call:
    from flash_colreduce import flash_colreduce

    shape = case.shape

    def call(inputs: Inputs) -> Raw:
        q, k, _, scale = inputs.args[:4]
        keys = _repeat(k, q.shape[1])
        columns = flash_colreduce(q[:, :, -shape.queries :], keys, reduction="sum", is_causal=True, scale=scale)
        return _padded(columns.float().mean(1)[:, _vision(shape)], shape)

    return call


def _colsum(case: Case) -> Call:
    from flash_colsum import flash_colsum

    shape = case.shape

    def call(inputs: Inputs) -> Raw:
        q, k, _, scale = inputs.args[:4]
        mean = flash_colsum(q[:, :, -shape.queries :].contiguous(), k, scale=scale, is_causal=True)
        return _padded(mean.float()[:, _vision(shape)] * shape.queries, shape)

    return call


@for_case
def _cls_matrix(case: Case, inputs: Inputs) -> Raw:
    _, k, scale = inputs.args
    attention = (inputs.extra["q"] @ k.transpose(-1, -2) * scale).softmax(-1)
    return F.pad(attention.mean(1)[:, 0, 1:].float(), (1, 0))


@for_case
def _cls_row(case: Case, inputs: Inputs) -> Raw:
    q, k, scale = inputs.args
    attention = (q[:, :, None] @ k.transpose(-1, -2) * scale).softmax(-1, dtype=torch.float32)
    return F.pad(attention.mean(1)[:, 0, 1:], (1, 0))


def matrix_bytes(case: Case) -> int:
    """The scores, the same with the mask added, the softmax in float32 and its copy in the dtype."""
    shape = case.shape
    return shape.batch * shape.heads * shape.length**2 * (3 * case.dtype.itemsize + 4)


def rows_bytes(case: Case) -> int:
    """The scores of the text rows, masked, and their softmax."""
    shape = case.shape
    return shape.batch * shape.heads * shape.queries * shape.length * (3 * case.dtype.itemsize + 4)


def _cls_bytes(case: Case) -> int:
    shape = case.shape
    return 3 * shape.batch * shape.images * shape.vision_heads * (1 + shape.patches) ** 2 * case.dtype.itemsize


_SCORES = ("text_vision_scores",)
_WHOLE = "the attention of all L x L pairs of one layer, of which the rows of text are then taken"
_ROWS = "q K^T of the rows of text, softmax in float32, mean over heads, sum and maximum over rows"
PUBLISHED = Baseline(
    "published", _SCORES, _whole(mask_on_host=True),
    _WHOLE + "; the mask is made on the host. The published code does it in every layer from the first pruning one on",
    as_pair, scratch=matrix_bytes,
)  # fmt: skip
MATRIX = Baseline(
    "whole matrix", _SCORES, _whole(mask_on_host=False),
    _WHOLE + "; the mask is made on the device, and only pruning layers do this",
    as_pair, scratch=matrix_bytes,
)  # fmt: skip
ROWS = Baseline("text rows", _SCORES, _text_rows, _ROWS, as_pair, scratch=rows_bytes)
MATRIX_MAP = Baseline(
    "whole matrix", ("text_vision_attention",), _whole_map, _WHOLE, only("attention"), scratch=matrix_bytes,
)  # fmt: skip
ROWS_MAP = Baseline(
    "text rows", ("text_vision_attention",), _text_rows_map, _ROWS, only("attention"), scratch=rows_bytes
)
PACKED = Baseline(
    "text rows", ("text_vision_scores_varlen",), _text_rows_packed, _ROWS + "; sequence by sequence",
    as_pair, scratch=rows_bytes,
)  # fmt: skip
PAGED = Baseline(
    "text rows", ("text_vision_scores_paged",), _text_rows_paged,
    f"each sequence's pages of {PAGE_SIZE} slots gathered first; {_ROWS}",
    as_pair, scratch=rows_bytes,
)  # fmt: skip
FLEX = Baseline(
    "flex attention", _SCORES, flex_total(),
    "FlexAttention fed with the lse, q and k swapped: its own normaliser is the total; it has no peak",
    only("total"), why_not=_why_no_flex, compiles=True,
)  # fmt: skip
COLREDUCE = Baseline(
    "flash-colreduce", _SCORES, _colreduce, "the PyPI package flash-colreduce: the total; it has no peak",
    only("total"), why_not=_package("flash_colreduce"),
)  # fmt: skip
COLSUM = Baseline(
    "flash-colsum", _SCORES, _colsum, "the PyPI package flash-colsum: the total; it has no peak",
    only("total"), why_not=_package("flash_colsum"),
)  # fmt: skip
SDPA = Baseline(
    "attention of the layer", ("text_vision_scores", "dual_attention_select", "topk_attention_select"), _sdpa,
    "scaled_dot_product_attention of the same layer, which runs anyway: what the scores are a share of",
    None, detail=sdpa_kernel,
)  # fmt: skip
CLS_MATRIX = Baseline(
    "published", ("cls_attention",), _cls_matrix, "the attention of all pairs, of which the CLS row is taken",
    only("attention"), scratch=_cls_bytes,
)  # fmt: skip
CLS_ROW = Baseline(
    "CLS row", ("cls_attention",), _cls_row, "q K^T of the CLS row, softmax, mean over heads", only("attention")
)

BASELINES = (
    PUBLISHED, MATRIX, compiled(MATRIX), ROWS, compiled(ROWS), FLEX, COLREDUCE, COLSUM, SDPA,
    MATRIX_MAP, ROWS_MAP, compiled(ROWS_MAP), PACKED, PAGED, CLS_MATRIX, CLS_ROW, compiled(CLS_ROW),
)  # fmt: skip
