# SPDX-License-Identifier: Apache-2.0
"""Gradients, and errors in backward for the ops without one. The gradient of gathering is tested in test_gather.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mustdrop_kernels.ops.contract import CONTRACTS

from . import oracle
from .cases import Watch, expected, f64, in_buffer, normal, pictures
from .sample_calls import sample, tensors_in
from .schemas import OPS

WITHOUT_GRADIENT = [op for op, one in CONTRACTS.items() if one.float_results and not one.gradient and not one.writes]


@pytest.mark.parametrize("with_sizes", [False, True])
@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"budget": 3}, {"merged_first": True}], ids=str)
def test_spatial_merge(backend, dtype, with_sizes, options):
    """d tokens / d x with the assignment fixed: s_i / sum of s where merged, 1 where alone."""
    x = pictures(2, [4, 6], [2, 2], 8, dtype=dtype, device=backend.device).requires_grad_()
    sizes = (
        torch.rand(2, 25, generator=torch.Generator().manual_seed(1)).to(backend.device) + 0.5 if with_sizes else None
    )
    got = backend.spatial_merge(x, [4, 6], [2, 2], sizes=sizes, **options)
    assert got.tokens.requires_grad
    assert not any(t.requires_grad for t in got[1:])
    upstream = normal(got.tokens.shape, 3, dtype, backend.device)
    (grad,) = torch.autograd.grad(got.tokens, x, upstream)
    want = oracle.spatial_merge(f64(x), [4, 6], [2, 2], sizes=None if sizes is None else f64(sizes), **options)
    weight = np.ones((2, 25)) if sizes is None else f64(sizes)
    share = weight / np.take_along_axis(want.sizes, want.assignment, 1)
    exact = share[..., None] * np.take_along_axis(f64(upstream), want.assignment[..., None], 1)
    assert grad.dtype == dtype
    assert grad.shape == x.shape
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(f64(grad), exact, rtol=2 * eps + 1e-6, atol=1e-7)


def test_spatial_merge_finite_differences(backend):
    """Finite differences: with a fixed assignment the op is linear, so the step size does not matter."""
    x = pictures(1, [4, 6], [2, 2], 6, device=backend.device).requires_grad_()
    weights = normal((1, 25, 6), 5, device=backend.device)

    def loss(v):
        got = backend.spatial_merge(v, [4, 6], [2, 2])
        return (got.tokens * weights[:, : got.tokens.shape[1]]).sum(), got.assignment

    value, assignment = loss(x)
    (grad,) = torch.autograd.grad(value, x)
    for seed in range(5):
        direction = normal(x.shape, seed, device=backend.device)
        step = 1e-3
        (above, s1), (below, s2) = loss(x.detach() + step * direction), loss(x.detach() - step * direction)
        assert torch.equal(s1, assignment)
        assert torch.equal(s2, assignment)
        slope = (above.double() - below.double()) / (2 * step)
        torch.testing.assert_close(slope, (grad * direction).double().sum(), rtol=2e-2, atol=2e-2)


def test_spatial_merge_strided_gradients(backend):
    """x as a view, and an expanded incoming gradient."""
    x = in_buffer(pictures(2, [4, 6], [2, 2], 8, device=backend.device)).requires_grad_()
    backend.spatial_merge(x, [4, 6], [2, 2]).tokens.sum().backward()
    torch.testing.assert_close(
        x.grad.sum(1), backend.spatial_merge(x, [4, 6], [2, 2]).counts[:, None].float().expand(-1, 8)
    )


@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_backward_without_gradient_raises(backend, op):
    """The forward accepts tensors that require a gradient; the backward raises an error that names the op."""
    given = sample(op, backend.device)
    plain = getattr(backend, op)(**given)
    given["q"].requires_grad_()
    result = getattr(backend, op)(**given)
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (plain, result)], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)
    floats = [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]
    for t in floats:
        assert t.requires_grad, "a result without requires_grad would hide the mistake"
        with pytest.raises(RuntimeError, match=f"mustdrop::{op} has no gradient"):
            t.sum().backward()


@pytest.mark.parametrize("op", ["select_dual", "select_topk"])
def test_selections_are_integers(backend, op):
    given = sample(op, backend.device)
    for name in ("total", "peak", "scores"):
        if name in given:
            given[name].requires_grad_()
    assert not any(t.requires_grad for t in getattr(backend, op)(**given))


@pytest.mark.parametrize("op", ["compact_kv_", "compact_paged_kv_"])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_compaction_refuses_tensors_that_require_grad(backend, op, which):
    given = sample(op, backend.device)
    given[which][1].requires_grad_()
    watch = Watch(*tensors_in(given))
    with pytest.raises(RuntimeError, match=f"mustdrop::{op}: .*{which}.*grad"):
        getattr(backend, op)(**given)
    assert watch.nothing_changed()
    with torch.no_grad():
        getattr(backend, op)(**given)
    assert not watch.nothing_changed()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, op, mode):
    """Every op runs under no_grad and inference_mode, on inference tensors and on parameters."""
    given = sample(op, backend.device)
    if op.endswith("_"):
        with mode():
            getattr(backend, op)(**sample(op, backend.device))
        return
    for t in tensors_in(given):
        t.requires_grad_(t.is_floating_point())
    with mode():
        inside = getattr(backend, op)(**given)
        again = getattr(backend, op)(**sample(op, backend.device))
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (inside, again)], strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_gradient_through_the_dispatcher(device):
    """torch.ops is differentiable as well."""
    x = normal((1, 5, 4), 1, device=device).requires_grad_()
    tokens, _, _, _ = torch.ops.mustdrop.spatial_merge(x, [2, 2], [2, 2], -1.0)
    tokens.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], expected(np.array([1, 0.25, 0.25, 0.25, 0.25]), device).float())
