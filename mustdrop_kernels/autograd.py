# SPDX-License-Identifier: Apache-2.0
"""Gradients: of spatial_merge and gather_tokens in ``x``, with the assignment held fixed; a clear error for the others.

One autograd.Function serves torch.ops (registered on the Autograd key) and explicitly chosen backends alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._namespace import NAMESPACE, operator
from .backends import OPS

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
IN_PLACE = ("compact_kv_", "compact_paged_kv_")


def needs_gradient(args: Sequence[object], kwargs: dict[str, object]) -> bool:
    """Whether autograd has to know about a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    for value in (*args, *kwargs.values()):
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return True
    return False


def apply(op: str, forward: Callable[..., Any], args: Sequence[object], kwargs: dict[str, object]) -> Any:
    """Run ``forward`` with the operator's gradient attached.

    Raises:
        RuntimeError: an in-place operator is asked to change tensors that require a gradient.
    """
    if op in IN_PLACE:
        raise RuntimeError(
            f"mustdrop::{op}: keys and values must not require grad (it works in place and has no gradient);"
            " call it under torch.no_grad()"
        )
    return _Operator.apply(op, forward, kwargs, *args)


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, forward: Callable[..., Any], kwargs: dict[str, object], *args: Any) -> Any:
        out = forward(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        ctx.op, ctx.num_args = op, len(args)
        if op == "spatial_merge":
            _, _, assignment, out_sizes = outputs
            ctx.mark_non_differentiable(out_sizes)
            ctx.save_for_backward(assignment, kwargs.get("sizes"), out_sizes)
            ctx.dtype = args[0].dtype
        elif op == "gather_tokens":
            ctx.save_for_backward(args[1], args[2])
            ctx.shape, ctx.dtype, ctx.align_end = args[0].shape, args[0].dtype, kwargs.get("align_end", False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.op == "spatial_merge":
            grad = _spatial_merge_backward(grads[0], *ctx.saved_tensors).to(ctx.dtype)
        elif ctx.op == "gather_tokens":
            keep, counts = ctx.saved_tensors
            grad = _gather_tokens_backward(grads[0], keep, counts, ctx.shape, ctx.align_end).to(ctx.dtype)
        else:
            raise RuntimeError(
                f"mustdrop::{ctx.op} has no gradient: its results decide which tokens stay;"
                " detach them, or call it under torch.no_grad()"
            )
        return (None, None, None, grad, *[None] * (ctx.num_args - 1))


def _spatial_merge_backward(
    grad: Tensor,  # [B, P+N', C] of tokens
    assignment: Tensor,  # [B, P+N]
    sizes: Tensor | None,  # [B, P+N]
    out_sizes: Tensor,  # [B, P+N']
) -> Tensor:  # [B, P+N, C] float32
    """d tokens[assignment[i]] / d x[i] = s_i / size of the token that i went into; exactly 1 where i stayed alone."""
    merged_size = out_sizes.gather(1, assignment)
    own_size = torch.ones_like(merged_size) if sizes is None else sizes
    weight = torch.where(own_size == merged_size, 1.0, own_size / merged_size)
    rows = grad.float().gather(1, assignment[..., None].expand(-1, -1, grad.shape[-1]))
    return rows * weight[..., None]


def _gather_tokens_backward(
    grad: Tensor,  # [B, K, ...]
    keep: Tensor,  # [B, K]
    counts: Tensor,  # [B]
    shape: torch.Size,  # (B, L, ...)
    align_end: bool,
) -> Tensor:  # [B, L, ...] float32, float64 where grad is
    """Each kept row's gradient goes back to where it was taken from; a row that was taken twice gets the sum."""
    length, capacity = shape[1], keep.shape[1]
    kept = counts.long().clamp(0, capacity)[:, None]
    slot = torch.arange(capacity, device=keep.device).expand_as(keep)
    valid = (slot < kept) & (keep >= 0) & (keep < length)
    if align_end:
        slot = (slot + capacity - kept).clamp(max=max(capacity - 1, 0))
    trailing = prod(shape[2:])
    flat = grad.to(torch.promote_types(grad.dtype, torch.float32)).reshape(shape[0], capacity, trailing)
    rows = flat.gather(1, slot[..., None].expand_as(flat)).masked_fill(~valid[..., None], 0.0)
    target = torch.where(valid, keep, length)  # one row past the end takes what is not valid
    out = flat.new_zeros(shape[0], length + 1, trailing)
    return out.scatter_add(1, target[..., None].expand_as(rows), rows)[:, :length].reshape(shape)


def _register_op(library: torch.library.Library, op: str) -> None:
    redispatch = operator(op).default.redispatch
    in_place = op in IN_PLACE

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if needs_gradient(args, kwargs):

            def below(*args: Any, **kwargs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return redispatch(keys & _BELOW_AUTOGRAD, *args, **kwargs)

            return apply(op, below, args, kwargs)
        if in_place:
            torch.autograd.graph.increment_version([*args[0], *args[1]])
        return redispatch(keys & _BELOW_AUTOGRAD, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


_libraries: list[torch.library.Library] = []


def register() -> None:
    """Register the gradients with torch's dispatcher. Called once, at import."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for op in OPS:
        if not op.startswith("select_"):  # their results are integers: nothing to differentiate
            _register_op(library, op)
