# SPDX-License-Identifier: Apache-2.0
"""``cls_attention``: attention of the CLS token, which selects the key tokens (MustDrop, stage 1)."""

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
    """Compute the head mean of the CLS row of the attention map, without the map.

    MustDrop (arXiv 2411.10803), stage 1: its highest values select the key token set.
    result[b, s] = mean over heads h of softmax over s of scale * q[b, h] . k[b, h, s].

    Args:
        q: (B, H, D) float32, float16 or bfloat16, the query of the CLS token.
        k: (B, H, S, D) of q's dtype, keys of the prefix and the patches.
        scale: factor of the scores, usually 1 / sqrt(D).
        counts: (B) int32, number of valid keys of each image, prefix included; default: S.
        num_prefix_tokens: number of leading keys that take part in the softmax but are zero in the result.
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        (B, S) float32, zero for prefix and padding. Not differentiable: the backward pass raises a RuntimeError.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    options = {"counts": counts, "num_prefix_tokens": num_prefix_tokens}
    return call("cls_attention", backend, q, k, scale, **options)


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
