# SPDX-License-Identifier: Apache-2.0
"""Inputs whose norms, sums or scores are far from 1: every backend decides as the float64 oracle.

Scales are powers of two and attention inputs small integers times one, so that the oracle's decisions have no rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import VISION, dtype_id, f64, normal, pictures, types_tensor
from .tolerance import assert_probabilities, assert_rounded_once, assert_scores

GRID, WINDOW = [4, 6], [2, 2]
OPTIONS: list[dict[str, Any]] = [
    {"threshold": 0.5},
    {"threshold": 0.0},
    {"budget": 3},
    {"uniform": True, "merged_first": True},
]
# Norms of float32 and bfloat16 from subnormal to beyond the largest number; squares leave float32 at 2^-63 and 2^64.
EXPONENTS = [-144, -130, -90, -64, -50, 62, 64, 90, 123]


def scaled(exponent: int, dtype: torch.dtype, device: str) -> Tensor:
    x = pictures(2, GRID, WINDOW, 16, dtype=torch.float32, device="cpu").double() * 2.0**exponent
    return x.to(dtype).to(device)


def merges_as_the_oracle(backend, x: Tensor, options: dict[str, Any]) -> None:
    got, want = backend.spatial_merge(x, GRID, WINDOW, **options), oracle.spatial_merge(f64(x), GRID, WINDOW, **options)
    np.testing.assert_array_equal(got.assignment.cpu().numpy(), want.assignment)
    np.testing.assert_array_equal(got.counts.cpu().numpy(), want.counts)
    largest = x.abs().max().item()
    if largest > torch.finfo(x.dtype).smallest_normal:
        assert_rounded_once(got.tokens, want.tokens, np.full_like(want.tokens, largest), "tokens")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_norms(backend, dtype, exponent, options):
    merges_as_the_oracle(backend, scaled(exponent, dtype, backend.device), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("exponent", [-24, -12, 12])
def test_norms_of_float16(backend, exponent, options):
    merges_as_the_oracle(backend, scaled(exponent, torch.float16, backend.device), options)


@pytest.mark.parametrize("exponents", [(-100, 0), (0, 100), (-120, 120), (-20, 70)], ids=str)
def test_norms_in_one_window(backend, exponents):
    """Tokens of very different norms: a cosine does not depend on them above the floor of 1e-8."""
    x = pictures(2, GRID, WINDOW, 16, dtype=torch.float32, device="cpu")
    powers = torch.tensor(exponents)[torch.arange(24) % 2].double()
    x[:, 1:] = (x[:, 1:].double() * 2.0 ** powers[:, None]).float()
    merges_as_the_oracle(backend, x.to(backend.device), {"threshold": 0.4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_means_whose_sum_overflows(backend, dtype):
    x = torch.full((1, 5, 8), 2.0**127, dtype=dtype, device=backend.device)
    x[0, 1, :4] = 2.0**126
    got = backend.spatial_merge(x, [2, 2], [2, 2], 0.5)
    assert got.counts.tolist() == [2]
    assert (got.tokens[0, 1, 4:] == 2.0**127).all()
    assert (got.tokens[0, 1, :4] == 2.0**126 * 1.75).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_infinite_tokens_do_not_merge(backend, value):
    x = torch.ones(1, 5, 8, device=backend.device)
    x[0, 2, 3] = value
    assert backend.spatial_merge(x, [2, 2], [2, 2], -1.0).counts.tolist() == [5]


@pytest.mark.parametrize("exponent", [-144, -130, -70])
def test_flushed_subnormals(backend, exponent):
    """Flushing subnormal numbers changes no decision: such a token counts as zero anyway."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    torch.set_flush_denormal(False)
    x = scaled(exponent, torch.float32, backend.device)
    call = backend.spatial_merge
    want = [call(x, GRID, WINDOW, **options).assignment for options in OPTIONS]
    torch.set_flush_denormal(True)
    try:
        got = [call(x, GRID, WINDOW, **options).assignment for options in OPTIONS]
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, got, want))


# ---------------------------------------------------------------------------------------------- attention


def vectors(shape: tuple[int, ...], seed: int, exponent: int, dtype: torch.dtype, device: str) -> Tensor:
    whole = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return (whole.double() * 2.0**exponent).to(dtype).to(device)


SCORES = [(torch.float32, e) for e in (-70, 6, 15, 58)] + [
    (torch.bfloat16, 58),
    (torch.float16, -12),
    (torch.float16, 13),
]


@pytest.mark.parametrize("scale", [0.25, -0.5])
@pytest.mark.parametrize(("dtype", "exponent"), SCORES, ids=str)
def test_cls_attention(backend, dtype, exponent, scale):
    q, k = (vectors(s, i, exponent, dtype, backend.device) for i, s in enumerate([(2, 3, 4), (2, 3, 40, 4)]))
    assert_probabilities(backend.cls_attention(q, k, scale), oracle.cls_attention(f64(q), f64(k), scale))


@pytest.mark.parametrize("scale", [0.25, -0.5])
@pytest.mark.parametrize(("dtype", "exponent"), SCORES, ids=str)
def test_text_vision_scores(backend, dtype, exponent, scale):
    types = np.array([[VISION] * 30 + [3] * 10, [0] * 5 + [VISION] * 20 + [1] * 8 + [3] * 7])
    q, k = (vectors(s, i, exponent, dtype, backend.device) for i, s in enumerate([(2, 4, 40, 4), (2, 2, 40, 4)]))
    got = backend.text_vision_scores(q, k, types_tensor(types.tolist(), backend.device), scale)
    assert_scores(got, *oracle.text_vision_scores(f64(q), f64(k), types, scale))


# ---------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("exponent", [-140, -120, -60, 60, 110])
def test_selection(backend, dtype, exponent):
    """Decisions on scores do not depend on their scale, subnormal numbers included."""
    whole = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(1)).double()
    whole = whole.bfloat16().double()
    types = torch.full((2, 40), VISION, dtype=torch.uint8, device=backend.device)
    base, x = (t.to(dtype).to(backend.device) for t in (whole, whole * 2.0 ** max(exponent, -133)))
    assert torch.equal(backend.select_topk(x, types, 7).keep, backend.select_topk(base, types, 7).keep)
    dual = [backend.select_dual(t, torch.zeros_like(t), types, 0.03125, 0.5).keep for t in (base, x)]
    if exponent > -120:  # the product with the sum is a normal number
        assert torch.equal(*dual)


def test_order_of_special_scores(backend):
    scores = [float("inf"), 3e38, 1e-40, 0.0, -0.0, -1e-40, -3e38, float("-inf"), float("nan")]
    types = torch.full((1, len(scores)), VISION, dtype=torch.uint8, device=backend.device)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(3))
    x = normal((1, len(scores)), 1, device=backend.device)
    x[0] = torch.tensor(scores)[order].to(x)
    rank = {int(place): i for i, place in enumerate(sorted(range(9), key=lambda j: _key(x[0, j].item(), j)))}
    for k in range(len(scores) + 1):
        kept = backend.select_topk(x, types, k).keep[0]
        assert kept[kept >= 0].tolist() == sorted(j for j in range(9) if rank[j] < k)


def _key(value: float, place: int) -> tuple[bool, float, int]:
    return value != value, 0.0 if value != value else -value, place
