# SPDX-License-Identifier: Apache-2.0
"""One ordinary call of each op: the start for refusals, opcheck and gradients, which change one thing at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from .cases import normal, prompt, random_bits, types_tensor
from .schemas import OPS


def sample(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The op's arguments by name."""
    build = {
        "spatial_merge": _spatial_merge,
        "cls_attention": _cls_attention,
        "text_vision_scores": _dense,
        "text_vision_scores_varlen": _varlen,
        "text_vision_scores_paged": _paged,
        "text_vision_attention": lambda *a: {**_dense(*a), "max_query": 3},
        "select_dual": _select_dual,
        "select_topk": _select_topk,
        "dual_attention_select": lambda *a: {
            **_dense(*a),
            "global_threshold": 0.05,
            "individual_threshold": 0.05,
            **_options(*a),
        },
        "topk_attention_select": lambda *a: {**_dense(*a), "budget": 3, "budgets": _ints([3, 4], a[0]), **_options(*a)},
        "gather_tokens": _gather,
        "compact_kv_": _compact,
        "compact_paged_kv_": _compact_paged,
    }
    assert set(build) == set(OPS)
    return build[op](device, dtype)


def _ints(values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def _spatial_merge(device, dtype):
    x = normal((2, 25, 8), 1, dtype, device)
    x[:, 1:9] = x[:, 1:2]
    sizes = torch.ones(2, 25, device=device)
    return {"x": x, "grid": [4, 6], "window": [2, 2], "threshold": 0.7, "sizes": sizes}


def _cls_attention(device, dtype):
    q, k = normal((2, 3, 8), 1, dtype, device), normal((2, 3, 11, 8), 2, dtype, device)
    return {"q": q, "k": k, "scale": 0.3, "counts": _ints([11, 6], device)}


def _dense(device, dtype):
    lse = torch.full((2, 4, 12), math.log(14.0), device=device)
    types = types_tensor([prompt(14), prompt(14, pad=3)], device)
    q, k = normal((2, 4, 12, 8), 1, dtype, device), normal((2, 2, 14, 8), 2, dtype, device)
    return {"q": q, "k": k, "token_types": types, "scale": 0.3, "lse": lse}


def _options(device, dtype):
    protected = torch.zeros(2, 14, dtype=torch.bool, device=device)
    protected[:, 2:9:3] = True
    return {"protected": protected, "capacity": 11, "drop_multiple": 2}


def _varlen(device, dtype):
    return {
        "q": normal((9, 4, 8), 1, dtype, device),
        "k": normal((14, 2, 8), 2, dtype, device),
        "token_types": types_tensor([prompt(8) + prompt(6)], device)[0].contiguous(),
        "cu_seqlens_q": _ints([0, 5, 9], device),
        "cu_seqlens_k": _ints([0, 8, 14], device),
        "max_seqlen_q": 5,
        "max_seqlen_k": 8,
        "scale": 0.3,
        "lse": torch.full((4, 9), 2.0, device=device),
    }


def _paged(device, dtype):
    return {
        "q": normal((9, 4, 8), 1, dtype, device),
        "k_cache": normal((7, 4, 2, 8), 2, dtype, device),
        "block_table": _ints([[5, 1, -1], [0, 3, -1]], device),
        "seq_lens": _ints([8, 6], device),
        "token_types": types_tensor([prompt(9), prompt(9)], device),
        "cu_seqlens_q": _ints([0, 5, 9], device),
        "max_seqlen_q": 5,
        "scale": 0.3,
        "lse": torch.full((4, 9), 2.0, device=device),
    }


def _select_dual(device, dtype):
    total, peak = normal((2, 14), 1, device=device).abs(), normal((2, 14), 2, device=device).abs()
    types = types_tensor([prompt(14), prompt(14, pad=3)], device)
    thresholds = {"global_threshold": 0.06, "individual_threshold": 0.6}
    return {"total": total, "peak": peak, "token_types": types, **thresholds, **_options(device, dtype)}


def _select_topk(device, dtype):
    types = types_tensor([prompt(14), prompt(14, pad=3)], device)
    scores, budgets = normal((2, 14), 1, device=device), _ints([3, 5], device)
    return {"scores": scores, "token_types": types, "k": 4, "budgets": budgets, **_options(device, dtype)}


def _keep(device):
    return _ints([[1, 4, 6, 9], [0, 1, 7, -1]], device, torch.int64), _ints([4, 3], device)


def _gather(device, dtype):
    keep, counts = _keep(device)
    return {"x": normal((2, 10, 6), 1, dtype, device), "keep": keep, "counts": counts, "align_end": True}


def _compact(device, dtype):
    keep, counts = _keep(device)
    keys = [random_bits((2, 3, 10, 8), i, torch.float16, device) for i in range(3)]
    values = [random_bits((2, 3, 10, 4), 9 + i, torch.float16, device) for i in range(3)]
    return {"keys": keys, "values": values, "keep": [keep], "counts": [counts], "align_end": True}


def _compact_paged(device, dtype):
    keep, counts = _keep(device)
    return {
        "keys": [random_bits((7, 4, 3, 8), i, torch.float16, device) for i in range(3)],
        "values": [random_bits((7, 4, 3, 4), 9 + i, torch.float16, device) for i in range(3)],
        "block_table": _ints([[5, 1, 2], [0, 3, 6]], device),
        "keep": [keep],
        "counts": [counts],
        "seq_lens": _ints([10, 9], device),
        "align_end": True,
    }


def tensors_in(arguments: dict[str, Any]) -> list[torch.Tensor]:
    flat = []
    for value in arguments.values():
        flat += value if isinstance(value, list) else [value]
    return [t for t in flat if isinstance(t, torch.Tensor)]
