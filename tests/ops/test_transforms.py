# SPDX-License-Identifier: Apache-2.0
"""torch.func and forward-mode AD: the values of a plain PyTorch formulation, or an error that names the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree as pytree

import mustdrop_kernels as mk
from mustdrop_kernels.ops.contract import CONTRACTS

from .cases import Watch, normal, pictures, same_bits
from .sample_calls import sample, tensors_in
from .schemas import OPS

FUNCTIONAL = [op for op, contract in CONTRACTS.items() if not contract.writes]
IN_PLACE = [op for op, contract in CONTRACTS.items() if contract.writes]
WITHOUT_GRADIENT = [op for op in FUNCTIONAL if CONTRACTS[op].float_results and not CONTRACTS[op].gradient]

Function = Callable[[Tensor], Tensor]


def pushed(f: Function) -> Callable[[Tensor], Any]:
    return lambda x: jvp(f, (x,), (torch.cos(x),))[1]


def pulled(f: Function) -> Callable[[Tensor], Any]:
    def at(x: Tensor) -> Any:
        out, pull = vjp(f, x)
        return pull(torch.sin(out))[0]

    return at


def forward_mode(f: Function) -> Callable[[Tensor], Any]:
    def at(x: Tensor) -> Any:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.cos(x)))).tangent
        assert tangent is not None
        return tangent

    return at


def double_backward(f: Function) -> Callable[[Tensor], Any]:
    def at(x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)

    return at


def cubed(f: Function) -> Function:
    return lambda x: f(x).pow(3).sum()


def two(x: Tensor) -> Tensor:
    return torch.stack([x, x * 1.5], 1)


TRANSFORMS: dict[str, Callable[[Function], Callable[[Tensor], Any]]] = {
    "grad": lambda f: grad(cubed(f)),
    "vjp": pulled,
    "jvp": pushed,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(cubed(f)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(cubed(f))),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(cubed(f))),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(cubed(f))),
    "grad(jvp)": lambda f: grad(lambda x: pushed(f)(x).pow(3).sum()),
    "vmap": lambda f: lambda x: vmap(f, 1)(two(x)),
    "vmap(vmap)": lambda f: lambda x: vmap(vmap(f, 1), 2)(torch.stack([two(x), two(x) * 2], 2)),
    "vmap(grad)": lambda f: lambda x: vmap(grad(cubed(f)), 1)(two(x)),
    "vmap(jvp)": lambda f: lambda x: vmap(pushed(f), 1)(two(x)),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f, 1)(two(x)).pow(3).sum()),
    "jvp(vmap)": lambda f: pushed(lambda x: vmap(f, 1)(two(x))),
    "linearize": lambda f: lambda x: linearize(f, x)[1](torch.cos(x)),
    "functionalize": functionalize,
    "functionalize(grad)": lambda f: functionalize(grad(cubed(f))),
    "forward_ad": forward_mode,
    "forward_ad without grad": lambda f: torch.no_grad()(forward_mode(f)),
    "double backward": double_backward,
}

KEEP, COUNTS = [[0, 3, 5, -1], [1, 2, 4, 6]], [3, 4]


def gathering(backend, align_end: bool) -> tuple[Function, Function, Tensor]:
    """The operator, a plain formulation of it, an argument."""
    keep = torch.tensor(KEEP, device=backend.device)
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=backend.device)

    def plain(x: Tensor) -> Tensor:
        rows = [x[b, keep[b, :n]] for b, n in enumerate(COUNTS)]
        room = [x.new_zeros(len(KEEP[0]) - n, *x.shape[2:]) for n in COUNTS]
        return torch.stack([torch.cat(p[::-1] if align_end else p) for p in zip(rows, room, strict=True)])

    return (
        lambda x: backend.gather_tokens(x, keep, counts, align_end=align_end),
        plain,
        normal((2, 7, 2), 1, device=backend.device),
    )


def merging(backend, options: dict[str, Any]) -> tuple[Function, Function, Tensor]:
    x = pictures(2, [2, 4], [2, 2], 2, device=backend.device)
    sizes = options.get("sizes", torch.ones(x.shape[:2])).to(x)
    found = mk.spatial_merge(x, [2, 4], [2, 2], 0.5, **options)
    assert (found.assignment.diff() <= 0).any(), "a window that merges"

    def plain(x: Tensor) -> Tensor:
        to_row = (found.assignment[:, None] == torch.arange(found.tokens.shape[1], device=x.device)[:, None]).to(x)
        weight = to_row * sizes[:, None]
        return weight @ x / weight.sum(-1, keepdim=True).clamp(min=1e-6)

    return lambda x: backend.spatial_merge(x, [2, 4], [2, 2], 0.5, **options).tokens, plain, x


SIZES = torch.linspace(0.5, 2, 18).view(2, 9)
DIFFERENTIABLE = {
    "gather_tokens": lambda backend: gathering(backend, False),
    "gather_tokens at the end": lambda backend: gathering(backend, True),
    "spatial_merge": lambda backend: merging(backend, {"sizes": SIZES}),
    "spatial_merge uniform": lambda backend: merging(backend, {"uniform": True}),
    "spatial_merge with budget": lambda backend: merging(backend, {"budget": 1, "merged_first": True}),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # by linearize
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", DIFFERENTIABLE)
def test_values(backend, which, transform):
    call, plain, x = DIFFERENTIABLE[which](backend)
    got, want = TRANSFORMS[transform](call)(x), TRANSFORMS[transform](plain)(x)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("align_end", [False, True])
def test_gradcheck(backend, align_end):
    """In float64, with derivatives of batches and of both modes of both modes."""
    call, _, x = gathering(backend, align_end)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(
        call, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        call, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["gather_tokens", "spatial_merge"])
def test_tangents_have_the_dtype_of_x(backend, which, dtype):
    call, _, x = DIFFERENTIABLE[which](backend)
    out, tangent = jvp(call, (x.to(dtype),), (torch.ones_like(x, dtype=dtype),))
    assert tangent.dtype == out.dtype == dtype


@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_no_derivative(backend, op):
    """A tangent raises in the call; torch.func.grad raises in the backward pass, like backward."""
    given = sample(op, backend.device)
    q = given.pop("q")

    def first(q: Tensor) -> Tensor:
        floats = [t for t in pytree.tree_leaves(getattr(backend, op)(q=q, **given)) if t.is_floating_point()]
        return floats[0]

    message = f"mustdrop::{op} has no gradient"
    for failing in (
        lambda: jvp(first, (q,), (q,)),
        lambda: jacfwd(first)(q),
        lambda: forward_mode(first)(q),
        lambda: grad(lambda q: first(q).sum())(q),
        lambda: jacrev(first)(q),
        lambda: vmap(grad(lambda q: first(q).sum()))(torch.stack([q, q])),
    ):
        with pytest.raises(RuntimeError, match=message):
            failing()
    assert grad(lambda q: (q * first(q.detach()).sum()).sum())(q).shape == q.shape


@pytest.mark.parametrize("op", ["select_dual", "select_topk"])
def test_selections_inside_a_derivative(backend, op):
    """Positions are integers: a tangent or gradient of the scores ends there, as at an argmax."""
    given = sample(op, backend.device)
    name = next(name for name in ("total", "scores") if name in given)
    x = given.pop(name)
    want = getattr(backend, op)(**{name: x}, **given).keep

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        keep = getattr(backend, op)(**{name: x}, **given).keep
        return (x.gather(1, keep.clamp(min=0)) ** 2).sum(), keep

    assert torch.equal(grad(f, has_aux=True)(x)[1], want)
    assert torch.equal(jvp(f, (x,), (x,), has_aux=True)[2], want)


@pytest.mark.parametrize("mode", ["requires_grad", "tangent"])
def test_differentiable_in_x_only(backend, mode):
    x = pictures(2, [2, 4], [2, 2], 2, device=backend.device)
    sizes = SIZES.to(x)
    with forward_ad.dual_level():
        sizes = sizes.clone().requires_grad_() if mode == "requires_grad" else forward_ad.make_dual(sizes, sizes)
        with pytest.raises(RuntimeError, match=r"mustdrop::spatial_merge: sizes must not require grad .* in x only"):
            backend.spatial_merge(x, [2, 4], [2, 2], sizes=sizes)


def mapped(given: dict[str, Any], batched: set[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Arguments of three calls, those named in ``batched`` different in each: stacked along dim 1, and one by one."""
    floats = {name for name in batched if given[name].is_floating_point()}
    calls = [
        {**given, **{name: given[name] * (1 + i / 4) if name in floats else given[name].roll(i, 0) for name in batched}}
        for i in range(3)
    ]
    return {name: torch.stack([call[name] for call in calls], 1) for name in batched}, calls


@pytest.mark.parametrize("options", [False, True], ids=["", "options"])
@pytest.mark.parametrize("op", FUNCTIONAL)
def test_vmap(backend, op, options):
    """vmap over one argument or over all tensors gives the results of the calls one by one."""
    given = sample(op, backend.device)
    if op == "spatial_merge" and options:
        given["uniform"] = True
    tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
    for batched in ({next(iter(given))}, tensors if "cu_seqlens_q" not in given else {"q", "lse"}):
        stacked, calls = mapped(given, batched)
        rest = {name: value for name, value in given.items() if name not in batched}
        got = vmap(lambda arguments, rest=rest: tuple_of(getattr(backend, op)(**arguments, **rest)), 1)(stacked)
        for i, call in enumerate(calls):
            for a, b in zip(got, tuple_of(getattr(backend, op)(**call)), strict=True):
                assert same_bits(a[i], b)


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("through", ["function", "torch.ops"])
@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_operators_are_refused(backend, op, through):
    call = getattr(backend, op) if through == "function" else getattr(torch.ops.mustdrop, op)
    given = sample(op, backend.device)
    watch = Watch(*tensors_in(given))

    def f(x: Tensor) -> Tensor:
        call(**given)
        return x.sum()

    def on_mapped(key: Tensor) -> Tensor:
        call(**{**given, "keys": [key, *given["keys"][1:]]})
        return key

    x = torch.ones(2, 2)
    for transformed in (grad(f), vmap(f), functionalize(f), lambda x: jvp(f, (x,), (x,)), jacrev(f)):
        with pytest.raises(RuntimeError, match=rf"mustdrop::{op}: .*torch\.func"):
            transformed(x)
    with pytest.raises(RuntimeError, match=rf"mustdrop::{op}: .*torch\.func"):
        vmap(on_mapped)(torch.stack(given["keys"][:2]))
    assert watch.nothing_changed()


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_in_place_operators_refuse_tangents(backend, op, which):
    given = sample(op, backend.device)
    watch = Watch(*tensors_in(given))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(given[which][1], torch.zeros_like(given[which][1]))
        given[which] = [given[which][0], dual, *given[which][2:]]
        with pytest.raises(RuntimeError, match=f"mustdrop::{op}: .*{which}.*tangent"):
            getattr(backend, op)(**given)
    assert watch.nothing_changed()


@pytest.mark.parametrize("op", OPS)
def test_torch_ops_take_the_same_path(op):
    """The kernels behind the transforms are registered for torch.ops and for explicit backends."""
    keys = ["FuncTorchDynamicLayerFrontMode"] if CONTRACTS[op].writes else ["FuncTorchBatched"]
    keys += ["Autograd"] if CONTRACTS[op].float_results else []
    for namespace in ("mustdrop", "mustdrop_explicit"):
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key), (namespace, key)
