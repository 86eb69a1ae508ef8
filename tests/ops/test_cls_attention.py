# SPDX-License-Identifier: Apache-2.0
"""cls_attention against the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from . import oracle
from .cases import Watch, f64, in_buffer, normal
from .changes import HALF, INT, dtypes_but, set_to, to_shape, with_gaps
from .tolerance import assert_probabilities


def inputs(batch=2, heads=3, span=20, dim=16, dtype=torch.float32, device="cpu", seed=0, gain=1.5):
    q = normal((batch, heads, dim), 2 * seed, dtype, device, gain)
    return q, normal((batch, heads, span, dim), 2 * seed + 1, dtype, device, gain), 1 / math.sqrt(dim)


def check(backend, q, k, scale, counts=None, **options) -> np.ndarray:
    watch = Watch(q, k, counts)
    got = backend.cls_attention(q, k, scale, counts=counts, **options)
    assert watch.nothing_changed()
    lengths = None if counts is None else counts.cpu().numpy()
    want = oracle.cls_attention(f64(q), f64(k), scale, lengths, options.get("num_prefix_tokens", 1))
    assert_probabilities(got, want, "cls_attention")
    assert got.device == q.device
    return want


@pytest.mark.parametrize(
    ("batch", "heads", "span", "dim"),
    [(1, 1, 1, 1), (1, 1, 2, 7), (2, 3, 63, 64), (1, 4, 65, 80), (3, 2, 130, 128), (1, 16, 577, 64), (2, 5, 17, 256)],
)
def test_shapes(backend, batch, heads, span, dim, dtype):
    want = check(backend, *inputs(batch, heads, span, dim, dtype, backend.device))
    if span > 2:
        assert want.sum() > 0


@pytest.mark.slow
def test_large(backend, dtype):
    check(backend, *inputs(8, 16, 577, 64, dtype, backend.device))
    check(backend, *inputs(1, 16, 4097, 72, dtype, backend.device))


@pytest.mark.parametrize("prefix", [0, 1, 5, 20, 25])
def test_prefix(backend, prefix):
    """The prefix is part of the denominator and zero in the result, even without other tokens."""
    check(backend, *inputs(device=backend.device), num_prefix_tokens=prefix)


def test_counts(backend):
    """`counts` is clamped to [0, S]; columns past it do not affect the result."""
    q, k, scale = inputs(6, 2, 20, 8, device=backend.device)
    counts = torch.tensor([0, 1, 7, 20, 99, -3], dtype=torch.int32, device=backend.device)
    for b, n in enumerate([0, 1, 7, 20, 20, 0]):
        k[b, :, n:] = math.nan
    check(backend, q, k, scale, counts)
    check(backend, q, k, scale, counts, num_prefix_tokens=3)


def test_strided_counts(backend):
    q, k, scale = inputs(4, 2, 9, 8, device=backend.device)
    counts = torch.tensor([3, 9, 1, 9, 9, 9, 0, 9], dtype=torch.int32, device=backend.device)[::2]
    check(backend, q, k, scale, counts)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_views(backend, dtype, order):
    q, k, scale = inputs(2, 3, 33, 20, dtype, backend.device)
    check(backend, in_buffer(q), in_buffer(k, order), scale)


def test_views_of_one_projection(backend):
    """q and k as slices of one packed [B, S, 3, H, D] projection, as in a vision tower, and an expanded batch."""
    qkv = normal((2, 17, 3, 4, 8), 1, device=backend.device)
    check(backend, qkv[:, 0, 0], qkv[:, :, 1].transpose(1, 2), 0.4)
    check(backend, qkv[:1, 0, 0].expand(3, -1, -1), qkv[:1, :, 1].transpose(1, 2).expand(3, -1, -1, -1), 0.4)


def test_empty(backend):
    for batch, heads, span in ((0, 2, 5), (2, 2, 0), (0, 0, 0)):
        check(backend, *inputs(batch, heads, span, 8, device=backend.device))


def test_uniform_and_sharp(backend):
    q, k, scale = inputs(2, 2, 50, 8, device=backend.device)
    got = backend.cls_attention(q * 0, k, scale, num_prefix_tokens=0)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 50), rtol=1e-6, atol=0)
    sharp = backend.cls_attention(q * 300, k * 300, scale, num_prefix_tokens=0)  # scores far beyond exp's range
    assert sharp.isfinite().all()
    torch.testing.assert_close(sharp.sum(1), torch.ones(2, device=backend.device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scales(backend, scale):
    q, k, _ = inputs(device=backend.device, gain=0.7)
    check(backend, q, k, scale)


def test_nan_stays_in_its_row(backend):
    q, k, scale = inputs(3, 2, 12, 8, device=backend.device)
    q[1, 0, 2] = math.nan
    want = check(backend, q, k, scale)
    assert np.isnan(want[1, 1:]).all()
    assert np.isfinite(want[[0, 2]]).all()


def test_minus_infinity(backend):
    """A column at -inf gets zero; the others sum to one."""
    q, k, scale = inputs(2, 2, 12, 4, device=backend.device)
    q[..., 0] = 1.0
    k[0, :, 5, 0] = -math.inf
    want = check(backend, q, k, scale)
    assert want[0, 5] == 0


def test_same_bits_every_run(backend, check_same_bits, dtype):
    q, k, scale = inputs(3, 4, 257, 64, dtype, backend.device)
    check_same_bits(lambda: [backend.cls_attention(q, k, scale)])


def test_key_set(backend, dtype):
    """select_topk of the result is the key set: prefix as text, patches as vision, the rest as padding."""
    q, k, scale = inputs(2, 4, 60, 16, dtype, backend.device)
    counts = torch.tensor([60, 41], dtype=torch.int32, device=backend.device)
    attention = backend.cls_attention(q, k, scale, counts=counts)
    types = torch.full((2, 60), 2, dtype=torch.uint8)
    types[:, 0] = 1
    types[1, 41:] = 0
    budgets = torch.tensor([5, 4], dtype=torch.int32, device=backend.device)
    keep, kept = backend.select_topk(attention, types.to(backend.device), 5, budgets=budgets)
    values = oracle.cls_attention(f64(q), f64(k), scale, counts.cpu().numpy())
    want, lengths = oracle.as_keep(oracle.select_topk(values, types.numpy(), 5, budgets=[5, 4]), 60)
    assert kept.tolist() == lengths.tolist() == [6, 5]
    assert keep.tolist() == want.tolist()


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "cls_attention": {
        "q": {
            "rank 1": to_shape(8),
            "rank 2": to_shape(2, 8),
            "rank 4": to_shape(2, 3, 1, 8),
            **dtypes_but(torch.float32, torch.float16, torch.bfloat16),
            "last dimension with gaps": with_gaps,
        },
        "k": {
            "rank 3": to_shape(2, 11, 8),
            "another batch": to_shape(1, 3, 11, 8),
            "other heads": to_shape(2, 1, 11, 8),
            "another head_dim": to_shape(2, 3, 11, 9),
            "another dtype": HALF,
            "last dimension with gaps": with_gaps,
        },
        "counts": {"int64": INT, "rank 2": to_shape(2, 1), "another batch": to_shape(3)},
        "num_prefix_tokens": {"negative": set_to(-1)},
    },
}
