# SPDX-License-Identifier: Apache-2.0
"""Sample calls: one of each operator, run by ``mustdrop doctor``, the tests and the GPU tools.

Small, with every option set: two sequences of 14 positions (the second padded on the left), 4 query heads and 2 key
heads of 8 channels, images of 4x6 patches, pages of 4 slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import CONTRACTS
from .token_types import TokenType

BATCH, LENGTH, PADDING = 2, 14, 3
Arguments = dict[str, Any]


def sample(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of a call by name: fixed values, new tensors in each call."""
    return _SAMPLES[op](_Make(device, dtype))


def outcome(op: str, arguments: Arguments, result: Any) -> dict[str, Tensor]:
    """The specified part of a call's results by name; of a compacted cache, the bits of the kept slots.

    ``arguments``: those of the call, with modified caches; ``keep`` and ``counts`` are shared by all layers.
    """
    if not CONTRACTS[op].writes:
        return {"result": result} if isinstance(result, Tensor) else dict(zip(result._fields, result, strict=True))
    found = {}
    for name in CONTRACTS[op].writes:
        for layer, cache in enumerate(arguments[name]):
            for b, count in enumerate(arguments["counts"][0].tolist()):
                if "block_table" in arguments:
                    kept = cache[arguments["block_table"][b].long()].flatten(0, 1)[: arguments["seq_lens"][b]]
                else:
                    kept = cache[b].transpose(0, 1)
                kept = kept[-count:] if arguments["align_end"] else kept[:count]
                found[f"{name}[{layer}] of sequence {b}"] = kept.view(torch.int16)
    return found


class _Make:
    """Factory of tensors on a device; ``dtype`` is that of floating-point inputs."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        return values.to(dtype or self.dtype).to(self.device)

    def bits(self, seed: int, *shape: int) -> Tensor:
        """Random float16 bit patterns, NaN included: moves must preserve them."""
        values = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        return values.to(torch.int16).view(torch.float16).to(self.device)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def types(self, *lengths: int, padding: int = 0) -> Tensor:
        """(len(lengths), longest): text, an image, text queries; the last sequence begins with padding."""
        rows = []
        for number, length in enumerate(lengths):
            pad = padding if number == len(lengths) - 1 else 0
            queries = (length - pad) // 7
            text, vision = [TokenType.TEXT] * 2, [TokenType.VISION] * (length - pad - queries - 2)
            rows.append([TokenType.PADDING] * pad + text + vision + [TokenType.QUERY] * queries)
        return self.ints(rows, torch.uint8)


def _spatial_merge(make: _Make) -> Arguments:
    x = make.normal(1, BATCH, 25, 8)
    x[:, 1:9] = x[:, 1:2]
    sizes = torch.ones(BATCH, 25, device=make.device)
    return {"x": x, "grid": [4, 6], "window": [2, 2], "threshold": 0.7, "sizes": sizes}


def _cls_attention(make: _Make) -> Arguments:
    q, k = make.normal(1, BATCH, 3, 8), make.normal(2, BATCH, 3, 11, 8)
    return {"q": q, "k": k, "scale": 0.3, "counts": make.ints([11, 6])}


def _dense(make: _Make) -> Arguments:
    q, k = make.normal(1, BATCH, 4, 12, 8), make.normal(2, BATCH, 2, LENGTH, 8)
    lse = torch.full((BATCH, 4, 12), math.log(LENGTH), device=make.device)
    return {"q": q, "k": k, "token_types": make.types(LENGTH, LENGTH, padding=PADDING), "scale": 0.3, "lse": lse}


def _packed(make: _Make) -> Arguments:
    """Common arguments of packed and paged batches: sequences of 8 and 6 positions, 5 and 4 rows."""
    q, lse = make.normal(1, 9, 4, 8), torch.full((4, 9), 2.0, device=make.device)
    return {"q": q, "cu_seqlens_q": make.ints([0, 5, 9]), "max_seqlen_q": 5, "scale": 0.3, "lse": lse}


def _varlen(make: _Make) -> Arguments:
    types = torch.cat([make.types(8)[0], make.types(7)[0, 1:]])
    keys = {"k": make.normal(2, LENGTH, 2, 8), "cu_seqlens_k": make.ints([0, 8, LENGTH]), "max_seqlen_k": 8}
    return {**_packed(make), **keys, "token_types": types}


def _paged(make: _Make) -> Arguments:
    cache = {"k_cache": make.normal(2, 7, 4, 2, 8), "block_table": make.ints([[5, 1, -1], [0, 3, -1]])}
    return {**_packed(make), **cache, "seq_lens": make.ints([8, 6]), "token_types": make.types(9, 9)}


def _options(make: _Make) -> Arguments:
    protected = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=make.device)
    protected[:, 2:9:3] = True
    return {"protected": protected, "capacity": 11, "drop_multiple": 2}


def _ranking(make: _Make, seed: int) -> Tensor:
    return make.normal(seed, BATCH, LENGTH, dtype=torch.float32).abs()


def _select_dual(make: _Make) -> Arguments:
    scores = {"total": _ranking(make, 1), "peak": _ranking(make, 2)}
    types = make.types(LENGTH, LENGTH, padding=PADDING)
    thresholds = {"global_threshold": 0.06, "individual_threshold": 0.6}
    return {**scores, "token_types": types, **thresholds, **_options(make)}


def _select_topk(make: _Make) -> Arguments:
    types = make.types(LENGTH, LENGTH, padding=PADDING)
    budgets = make.ints([3, 5])
    return {"scores": _ranking(make, 1), "token_types": types, "k": 4, "budgets": budgets, **_options(make)}


def _kept(make: _Make) -> Arguments:
    return {"keep": make.ints([[1, 4, 6, 9], [0, 1, 7, -1]], torch.int64), "counts": make.ints([4, 3])}


def _shared(make: _Make) -> Arguments:
    """One keep set for all layers."""
    return {name: [value] for name, value in _kept(make).items()}


def _caches(make: _Make, *shape: int) -> Arguments:
    keys = [make.bits(layer, *shape, 8) for layer in range(3)]
    return {"keys": keys, "values": [make.bits(9 + layer, *shape, 4) for layer in range(3)]}


def _compact_paged(make: _Make) -> Arguments:
    table, lengths = make.ints([[5, 1, 2], [0, 3, 6]]), make.ints([10, 9])
    return {**_caches(make, 7, 4, 3), "block_table": table, **_shared(make), "seq_lens": lengths, "align_end": True}


_SAMPLES: dict[str, Callable[[_Make], Arguments]] = {
    "spatial_merge": _spatial_merge,
    "cls_attention": _cls_attention,
    "text_vision_scores": _dense,
    "text_vision_scores_varlen": _varlen,
    "text_vision_scores_paged": _paged,
    "text_vision_attention": lambda make: {**_dense(make), "max_query": 3},
    "select_dual": _select_dual,
    "select_topk": _select_topk,
    "dual_attention_select": lambda make: {
        **_dense(make),
        "global_threshold": 0.05,
        "individual_threshold": 0.05,
        **_options(make),
    },
    "topk_attention_select": lambda make: {**_dense(make), "budget": 3, "budgets": make.ints([3, 4]), **_options(make)},
    "gather_tokens": lambda make: {"x": make.normal(1, BATCH, 10, 6), **_kept(make), "align_end": True},
    "compact_kv_": lambda make: {**_caches(make, BATCH, 3, 10), **_shared(make), "align_end": True},
    "compact_paged_kv_": _compact_paged,
}
