# SPDX-License-Identifier: Apache-2.0
"""``cls_attention``: attention of the CLS token, by which the key set is chosen (MustDrop, stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .contract import Call, define
from .dispatch import call

__all__ = ["cls_attention"]


def cls_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    counts: Tensor | None = None,
    num_prefix_tokens: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Head mean of the CLS row of the attention map, without building the map (MustDrop, the key set).

    Args:
        q: (B, H, D) float, the CLS query.
        k: (B, H, S, D), keys of prefix and patches.
        scale: factor of the scores, usually 1 / sqrt(D).
        counts: (B) int32, number of valid keys of the S; default all.
        num_prefix_tokens: number of prefix tokens. They take part in the softmax and are zero in the result.
        backend: name of an explicit backend.

    Returns:
        (B, S) float32, zero for prefix and padding.
    """
    options = {"counts": counts, "num_prefix_tokens": num_prefix_tokens}
    return call("cls_attention", backend, q, q, k, scale, **options)


def _check(a: Call) -> None:
    check = Checker(a, a.q)
    check.tensor("q", a.q, ("B", "H", "D"), FLOATS)
    check.tensor("k", a.k, (a.q.shape[0], a.q.shape[1], "S", a.q.shape[2]), (a.q.dtype,))
    if a.counts is not None:
        check.tensor("counts", a.counts, (a.q.shape[0],), (torch.int32,), any_strides=True)
    check.at_least("num_prefix_tokens", a.num_prefix_tokens, 0)


def _fake(a: Call) -> Tensor:
    return a.q.new_empty(a.k.shape[0], a.k.shape[2], dtype=torch.float32)


define(cls_attention, _check, _fake)
