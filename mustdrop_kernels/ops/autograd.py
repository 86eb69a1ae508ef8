# SPDX-License-Identifier: Apache-2.0
"""Gradients of the operators in reverse and forward mode, and errors for those without one.

One autograd.Function serves every operator, on the Autograd key, which the transforms of ``torch.func`` process once
for each of their levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .contract import CONTRACTS, Call, Contract

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


def _has_tangent(t: Tensor) -> bool:
    return t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None


def _is_differentiated(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """True if autograd records a call with these arguments, or carries their tangents along."""
    records, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not (records or forward):
        return False
    for value in (*args, *kwargs.values()):
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor) and ((records and t.requires_grad) or (forward and _has_tangent(t))):
                return True
    return False


def _refuse(contract: Contract, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse differentiated arguments that the operator has no gradient for.

    In reverse mode an operator without a gradient raises in the backward pass: its results may be used without one.
    """
    op, gradient = contract.name, contract.gradient
    if contract.writes:
        raise RuntimeError(
            f"mustdrop::{op}: keys and values must not require grad or have a forward-mode tangent (it works in place"
            " and has no gradient); detach them, or call it under torch.no_grad()"
        )
    if gradient is None:
        with torch.no_grad():
            if _is_differentiated(args, kwargs):
                raise RuntimeError(_no_gradient(op))
        return
    x, *others = contract.defaults
    given = vars(contract.bind(args, kwargs))
    for name in others:
        if isinstance(given[name], Tensor) and _is_differentiated((given[name],), {}):
            raise RuntimeError(
                f"mustdrop::{op}: {name} must not require grad or have a forward-mode tangent (it is differentiable in"
                f" {x} only); detach it"
            )


def _no_gradient(op: str) -> str:
    return (
        f"mustdrop::{op} has no gradient: its results decide which tokens stay;"
        " detach them, or call it on detached tensors"
    )


class _Operator(_SingleLevelFunction):
    """An operator at one level of differentiation: further levels differentiate ``forward``, ``backward`` and ``jvp``.

    ``torch.autograd.Function`` would take the levels of ``torch.func`` apart itself, above the dispatcher.
    """

    @staticmethod
    def forward(ctx: Any, op: str, forward: Callable[..., Any], kwargs: dict[str, object], *args: Any) -> Any:
        # Enabled for the levels below this one, which autograd.Function disables; each has a mode of its own.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            out = forward(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        ctx.op, ctx.num_args, ctx.num_outputs = op, len(args), len(outputs)
        gradient = CONTRACTS[op].gradient
        if gradient is None:
            ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
            return out
        ctx.mark_non_differentiable(*outputs[1:])
        call = CONTRACTS[op].bind(args, kwargs)
        saved = gradient.saved(call, outputs)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.options = Call(op, {name: v for name, v in vars(call).items() if not isinstance(v, Tensor)})
        ctx.shape, ctx.dtype = args[0].shape, args[0].dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = CONTRACTS[ctx.op].gradient
        if gradient is None:
            raise RuntimeError(_no_gradient(ctx.op))
        grad = gradient.backward(ctx.options, ctx.shape, grads[0], ctx.saved_tensors).to(ctx.dtype)
        return (None, None, None, grad, *[None] * (ctx.num_args - 1))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        gradient, tangent = CONTRACTS[ctx.op].gradient, tangents[3]
        assert gradient is not None
        assert tangent is not None
        first = gradient.forward(ctx.options, tangent, ctx.saved_tensors).to(ctx.dtype)
        return first if ctx.num_outputs == 1 else (first, *[None] * (ctx.num_outputs - 1))


def register(library: torch.library.Library, contract: Contract, overload: Any, leading: int) -> None:
    """Register an operator's gradient with torch's dispatcher.

    ``overload``: the operator, with ``leading`` arguments in front of those of its contract.
    """
    redispatch = overload.redispatch

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        own = args[leading:]
        if _is_differentiated(own, kwargs):
            _refuse(contract, own, kwargs)

            def below(*own: Any, **kwargs: Any) -> Any:
                return redispatch(keys & _BELOW_AUTOGRAD, *args[:leading], *own, **kwargs)

            with enable_single_level_autograd_function():
                return _Operator.apply(contract.name, below, kwargs, *own)  # type: ignore[attr-defined]
        if contract.writes:
            call = contract.bind(own, kwargs)
            torch.autograd.graph.increment_version([t for name in contract.writes for t in getattr(call, name)])
        return redispatch(keys & _BELOW_AUTOGRAD, *args, **kwargs)

    library.impl(contract.name, kernel, "Autograd", with_keyset=True)
