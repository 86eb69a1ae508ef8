# SPDX-License-Identifier: Apache-2.0
"""Gradients of the operators, and errors for those without one.

One autograd.Function serves torch.ops (registered on the Autograd key) and explicitly chosen backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._namespace import NAMESPACE, operator
from .contract import CONTRACTS, Call

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


def needs_gradient(args: Sequence[object], kwargs: dict[str, object]) -> bool:
    """True if autograd records a call with these arguments."""
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
        RuntimeError: an in-place operator would change tensors that require a gradient.
    """
    if CONTRACTS[op].writes:
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
        ctx.op, ctx.num_args = op, len(args)
        gradient = CONTRACTS[op].gradient
        if gradient is None:
            ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
            return out
        ctx.mark_non_differentiable(*outputs[1:])
        call = CONTRACTS[op].bind(args, kwargs)
        ctx.save_for_backward(*gradient.saved(call, outputs))
        ctx.options = Call(op, {name: v for name, v in vars(call).items() if not isinstance(v, Tensor)})
        ctx.shape, ctx.dtype = args[0].shape, args[0].dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = CONTRACTS[ctx.op].gradient
        if gradient is None:
            raise RuntimeError(
                f"mustdrop::{ctx.op} has no gradient: its results decide which tokens stay;"
                " detach them, or call it under torch.no_grad()"
            )
        grad = gradient.backward(ctx.options, ctx.shape, grads[0], ctx.saved_tensors).to(ctx.dtype)
        return (None, None, None, grad, *[None] * (ctx.num_args - 1))


def _register_op(library: torch.library.Library, op: str) -> None:
    redispatch = operator(op).default.redispatch
    contract = CONTRACTS[op]

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if needs_gradient(args, kwargs):

            def below(*args: Any, **kwargs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return redispatch(keys & _BELOW_AUTOGRAD, *args, **kwargs)

            return apply(op, below, args, kwargs)
        if contract.writes:
            call = contract.bind(args, kwargs)
            torch.autograd.graph.increment_version([t for name in contract.writes for t in getattr(call, name)])
        return redispatch(keys & _BELOW_AUTOGRAD, *args, **kwargs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


_libraries: list[torch.library.Library] = []


def register() -> None:
    """Register the gradients with torch's dispatcher. Called once, at import."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for op, contract in CONTRACTS.items():
        if contract.float_results:
            _register_op(library, op)
