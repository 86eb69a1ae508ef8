# SPDX-License-Identifier: Apache-2.0
"""Gradients of spatial_merge and gather_tokens; for the other ops a clear error, and only where one is asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from . import oracle
from .cases import FLOATS, Watch, dtype_id, expected, f64, in_buffer, normal, pictures
from .sample_calls import sample, tensors_in
from .schemas import OPS

WITHOUT_GRADIENT = [
    "cls_attention",
    "text_vision_scores",
    "text_vision_scores_varlen",
    "text_vision_scores_paged",
    "text_vision_attention",
    "dual_attention_select",
    "topk_attention_select",
]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
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
    """Steps too small to change a decision: the op is linear there, so large steps are as good as small ones."""
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
    """x as a view, and an expanded gradient coming in."""
    x = in_buffer(pictures(2, [4, 6], [2, 2], 8, device=backend.device)).requires_grad_()
    backend.spatial_merge(x, [4, 6], [2, 2]).tokens.sum().backward()
    torch.testing.assert_close(
        x.grad.sum(1), backend.spatial_merge(x, [4, 6], [2, 2]).counts[:, None].float().expand(-1, 8)
    )


@pytest.mark.parametrize("align_end", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=dtype_id)
def test_gather_tokens(backend, dtype, align_end):
    """Gradients go back to where the rows came from; a row taken twice gets the sum, one out of range nothing."""
    x = normal((3, 10, 6), 1, dtype, backend.device).requires_grad_()
    keep = torch.tensor([[0, 3, 3, 9], [2, 50, -1, 5], [7, 8, 9, 1]], device=backend.device)
    counts = torch.tensor([4, 3, -1], dtype=torch.int32, device=backend.device)
    got = backend.gather_tokens(x, keep, counts, align_end=align_end)
    upstream = normal(got.shape, 2, dtype, backend.device)
    (grad,) = torch.autograd.grad(got, x, upstream)
    exact = np.zeros((3, 10, 6))
    for b in range(3):
        n = max(0, min(int(counts[b]), 4))
        for i in range(n):
            if 0 <= keep[b, i] < 10:
                exact[b, keep[b, i]] += f64(upstream)[b, 4 - n + i if align_end else i]
    assert grad.dtype == dtype
    np.testing.assert_allclose(
        f64(grad), exact, rtol=torch.finfo(dtype).eps, atol=1e-7 if dtype != torch.float64 else 0
    )


@pytest.mark.parametrize("align_end", [False, True])
def test_gather_tokens_gradcheck(backend, align_end):
    """In float64, against finite differences of the op itself."""
    x = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(backend.device)
    keep = torch.tensor([[1, 1, 5], [0, 4, -1]], device=backend.device)
    counts = torch.tensor([3, 2], dtype=torch.int32, device=backend.device)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: backend.gather_tokens(v, keep, counts, align_end=align_end), (x,))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("capacity", [0, 3])
def test_gather_tokens_empty_gradients(backend, shape, capacity):
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    keep = torch.zeros(shape[0], capacity, dtype=torch.int64, device=backend.device)
    counts = torch.full((shape[0],), capacity, dtype=torch.int32, device=backend.device)
    backend.gather_tokens(x, keep, counts).sum().backward()
    assert x.grad.shape == x.shape
    if x.numel():
        assert float(x.grad.sum()) == capacity * math.prod((shape[0], *shape[2:]))


def test_gather_tokens_of_whole_numbers(backend):
    """Nothing to differentiate, nothing in the way."""
    given = sample("gather_tokens", backend.device)
    given["x"] = given["x"].long()
    assert not backend.gather_tokens(**given).requires_grad


@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
def test_no_gradient_says_so(backend, op):
    """The forward works on tensors that require a gradient; asking for it names the op."""
    given = sample(op, backend.device)
    plain = getattr(backend, op)(**given)
    given["q"].requires_grad_()
    result = getattr(backend, op)(**given)
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (plain, result)], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)
    floats = [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]
    for t in floats:
        assert t.requires_grad, "a result that silently has no gradient hides the mistake"
        with pytest.raises(RuntimeError, match=f"mustdrop::{op} has no gradient"):
            t.sum().backward()


@pytest.mark.parametrize("op", ["select_dual", "select_topk"])
def test_selections_are_whole_numbers(backend, op):
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
    """Under no_grad and inference_mode every op runs, on inference tensors and on parameters."""
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
    """torch.ops itself differentiates, too."""
    x = normal((1, 5, 4), 1, device=device).requires_grad_()
    tokens, _, _, _ = torch.ops.mustdrop.spatial_merge(x, [2, 2], [2, 2], -1.0)
    tokens.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], expected(np.array([1, 0.25, 0.25, 0.25, 0.25]), device).float())
