# SPDX-License-Identifier: Apache-2.0
"""``gather_tokens``: the kept rows of hidden states, position ids, masks or token types (MustDrop, stage 2)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .checks import Checker
from .contract import Call, Gradient, define
from .dispatch import call

__all__ = ["gather_tokens"]


def gather_tokens(
    x: Tensor, keep: Tensor, counts: Tensor, *, align_end: bool = False, backend: str | None = None
) -> Tensor:
    """Gather the kept tokens of hidden states, position ids, masks or token types.

    MustDrop (arXiv 2411.10803), stage 2: row i of the result is x[b, keep[b, i]].

    Args:
        x: (B, L, ...) of any dtype.
        keep: (B, K) int64, positions. A position outside 0 .. L - 1 gives zeros.
        counts: (B) int32; the first min(counts, K) entries of ``keep`` are used.
        align_end: put the tokens at the end of the result instead of its beginning (left padding).
        backend: name of an explicit backend; default: that of ``use_backend``, else the one that serves the operator.

    Returns:
        (B, K, ...) of x's dtype, zero where there is no token. Differentiable in ``x``.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, layout or value; the message names it.
        BackendError: the explicit backend does not exist or does not serve this operator on this device.
    """
    return call("gather_tokens", backend, x, keep, counts, align_end=align_end)


def _check(a: Call) -> None:
    check = Checker(a, a.x)
    check.strided("x", a.x)
    check(a.x.dim() >= 2, "x", f"must be (B, L, ...), got {tuple(a.x.shape)}")
    if a.x.dim() > 2:
        check.last_contiguous("x", a.x)
    check.tensor("keep", a.keep, (a.x.shape[0], "K"), (torch.int64,))
    check.tensor("counts", a.counts, (a.x.shape[0],), (torch.int32,), any_strides=True)


def _fake(a: Call) -> Tensor:
    return a.x.new_empty(a.keep.shape[0], a.keep.shape[1], *a.x.shape[2:])


def _saved(a: Call, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return a.keep, a.counts


def _backward(a: Call, shape: torch.Size, grad: Tensor, saved: tuple[Tensor | None, ...]) -> Tensor:
    source, target = _places(a, shape[1], saved)
    return _moved(grad, target, source, shape[1])


def _forward(a: Call, tangent: Tensor, saved: tuple[Tensor | None, ...]) -> Tensor:
    source, target = _places(a, tangent.shape[1], saved)
    return _moved(tangent, source, target, target.shape[1])


def _places(a: Call, length: int, saved: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Rows of x and of the result (B, K) that each entry of ``keep`` moves; ``length`` and K where it moves none."""
    keep, counts = saved  # [B, K], [B]
    assert keep is not None
    assert counts is not None
    capacity = keep.shape[1]
    kept = counts.long().clamp(0, capacity)[:, None]
    entry = torch.arange(capacity, device=keep.device).expand_as(keep)
    moves = (entry < kept) & (keep >= 0) & (keep < length)
    target = entry + (capacity - kept) if a.align_end else entry
    return torch.where(moves, keep, length), torch.where(moves, target, capacity)


def _moved(x: Tensor, source: Tensor, target: Tensor, length: int) -> Tensor:
    """(B, length, ...): sum of the rows of x that move to each row, accumulated in float32 or wider.

    Entries that move no row go from one extra row to another.
    """
    batch, trailing = x.shape[0], x.shape[2:]
    flat = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, x.shape[1], prod(trailing))
    padded = torch.nn.functional.pad(flat, (0, 0, 0, 1))
    columns = (-1, -1, flat.shape[2])
    rows = padded.gather(1, source[..., None].expand(columns))
    out = flat.new_zeros(batch, length + 1, flat.shape[2])
    out = out.scatter_add(1, target[..., None].expand(columns), rows)
    return out[:, :length].reshape(batch, length, *trailing)


define(gather_tokens, _check, _fake, gradient=Gradient(_saved, _backward, _forward))
