# SPDX-License-Identifier: Apache-2.0
"""gather_tokens against the oracle, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle
from .cases import FLOATS, MOVABLE, Watch, as_bytes, dtype_id, f64, generator, in_buffer, normal, random_bits, same_bits
from .changes import dtypes_but, to_dtype, to_shape, with_gaps
from .sample_calls import sample


def sets(
    batch: int, length: int, capacity: int, counts: list[int], seed: int = 0, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Ascending positions, -1 past the counts (which may be out of range)."""
    keep = torch.full((batch, capacity), -1, dtype=torch.int64)
    for b, count in enumerate(counts):
        n = max(0, min(count, capacity, length))
        keep[b, :n] = torch.randperm(length, generator=generator(seed + b))[:n].sort().values
    return keep.to(device), torch.tensor(counts, dtype=torch.int32, device=device)


def rows(x: Tensor) -> np.ndarray:
    """(B, L, ...) -> (B, L, bytes)."""
    return as_bytes(x.reshape(*x.shape[:2], math.prod(x.shape[2:])))


def check(backend, x: Tensor, keep: Tensor, counts: Tensor, align_end: bool = False) -> Tensor:
    watch = Watch(x, keep, counts)
    got = backend.gather_tokens(x, keep, counts, align_end=align_end)
    assert watch.nothing_changed()
    assert got.dtype == x.dtype
    assert got.device == x.device
    assert tuple(got.shape) == (x.shape[0], keep.shape[1], *x.shape[2:])
    want = oracle.gather_tokens(rows(x), keep.cpu().numpy(), counts.cpu().numpy(), align_end)
    assert (rows(got) == want).all()
    return got


@pytest.mark.parametrize("dtype", MOVABLE, ids=dtype_id)
@pytest.mark.parametrize("trailing", [(), (1,), (7,), (64,), (3, 5), (2, 1, 33)], ids=str)
def test_element_types_and_ranks(backend, dtype, trailing, align_end):
    x = random_bits((3, 20, *trailing), 1, dtype, backend.device)
    keep, counts = sets(3, 20, 12, [12, 5, 0], device=backend.device)
    check(backend, x, keep, counts, align_end)


@pytest.mark.parametrize(("length", "capacity"), [(1, 1), (2, 2), (63, 30), (65, 65), (671, 159), (100, 130)])
def test_sizes(backend, length, capacity, align_end):
    x = random_bits((2, length, 96), 1, torch.bfloat16, backend.device)
    full = min(length, capacity)
    keep, counts = sets(2, length, capacity, [full, full // 2], device=backend.device)
    check(backend, x, keep, counts, align_end)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_large(backend, dtype):
    x = random_bits((2, 2980, 4096), 1, dtype, backend.device)
    keep, counts = sets(2, 2980, 700, [700, 640], device=backend.device)
    check(backend, x, keep, counts)
    check(backend, x, keep, counts, True)


@pytest.mark.parametrize("counts", [[9, 99, -5, 6], [2**31 - 1, -(2**31), 0, 7]], ids=str)
def test_counts_out_of_range(backend, counts, align_end):
    """counts is clamped to [0, capacity]."""
    x = random_bits((4, 20, 8), 1, torch.float32, backend.device)
    keep, lengths = sets(4, 20, 6, counts, device=backend.device)
    check(backend, x, keep, lengths, align_end)


@pytest.mark.parametrize("bad", [-1, 20, -(2**63), 2**63 - 1, 2**32 + 3])
def test_indices_out_of_range_give_zeros(backend, bad, align_end):
    x = random_bits((2, 20, 8), 1, torch.float32, backend.device)
    keep, counts = sets(2, 20, 6, [6, 4], device=backend.device)
    keep[0, 2] = bad
    keep[1, 3] = bad
    got = check(backend, in_buffer(x), keep, counts, align_end)
    assert not as_bytes(got[0, 2]).any()


def test_any_order_and_repeats(backend):
    """Indices may repeat and need not ascend."""
    x = random_bits((1, 5, 3), 1, torch.float32, backend.device)
    keep = torch.tensor([[4, 0, 4, 4, 2, 1, 0]], device=backend.device)
    check(backend, x, keep, torch.tensor([7], dtype=torch.int32, device=backend.device))


def test_slots_past_counts_are_not_read(backend, align_end):
    x = random_bits((2, 20, 8), 1, torch.float32, backend.device)
    keep, counts = sets(2, 20, 6, [4, 0], device=backend.device)
    keep[0, 4:] = 3
    keep[1] = 10**12
    check(backend, x, keep, counts, align_end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=dtype_id)
def test_views(backend, dtype, align_end):
    x = random_bits((2, 20, 6, 5), 1, dtype, backend.device)
    keep, counts = sets(2, 20, 9, [9, 4], device=backend.device)
    keep, x3 = in_buffer(keep), x[..., 0, :]
    for view in (
        in_buffer(x),
        in_buffer(x, (1, 0, 2, 3)),
        in_buffer(x, (2, 1, 0, 3)),
        x[:1].expand(2, -1, -1, -1),
        x[:, :, :1].expand(-1, -1, 4, -1),
        x3,
        x[:, ::2].repeat_interleave(2, 1),
        x[:, 5:15],
    ):
        check(backend, view, keep, counts, align_end)
    strided = counts.repeat_interleave(3)[::3]
    check(backend, x, keep, strided, align_end)


def test_position_ids_and_masks(backend, align_end):
    """2-D tensors as views: expanded position ids, a slice of a mask."""
    keep, counts = sets(3, 20, 9, [9, 4, 0], device=backend.device)
    positions = torch.arange(20, device=backend.device).expand(3, -1)
    got = check(backend, positions, keep, counts, align_end)
    if not align_end:
        assert got[0].tolist() == keep[0].tolist()
    check(backend, in_buffer(positions), keep, counts, align_end)
    check(backend, torch.ones(3, 30, dtype=torch.bool, device=backend.device)[:, 5:25], keep, counts, align_end)
    # The gathered axis may have any stride.
    check(backend, torch.arange(120, device=backend.device).view(3, 40)[:, ::2], keep, counts, align_end)
    check(backend, torch.arange(60, device=backend.device).view(20, 3).t(), keep, counts, align_end)


def test_all_and_none(backend):
    x = random_bits((2, 7, 4), 1, torch.float32, backend.device)
    keep = torch.arange(7, device=backend.device).expand(2, -1).contiguous()
    everything = backend.gather_tokens(x, keep, torch.tensor([7, 7], dtype=torch.int32, device=backend.device))
    assert same_bits(everything, x)
    assert everything.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    nothing = backend.gather_tokens(x, keep, torch.tensor([0, 0], dtype=torch.int32, device=backend.device))
    assert not as_bytes(nothing).any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("capacity", [0, 4])
def test_empty(backend, shape, capacity):
    x = torch.zeros(shape, device=backend.device)
    keep = torch.zeros(shape[0], capacity, dtype=torch.int64, device=backend.device)
    counts = torch.full((shape[0],), capacity, dtype=torch.int32, device=backend.device)
    for align_end in (False, True):
        check(backend, x, keep, counts, align_end)


def test_after_select(backend):
    """keep and counts as returned by a selection, with a capacity below the number of tokens kept."""
    types = torch.full((2, 12), 2, dtype=torch.uint8, device=backend.device)
    scores = torch.randn(2, 12, generator=generator(1)).to(backend.device)
    x = random_bits((2, 12, 4), 3, torch.float16, backend.device)
    for capacity in (None, 3, 5, 20):
        keep, counts = backend.select_topk(scores, types, 5, capacity=capacity)
        check(backend, x, keep, counts)
        check(backend, x, keep, counts, True)


def test_same_bits_every_run(backend, check_same_bits):
    x = random_bits((4, 300, 128), 1, torch.float32, backend.device)
    keep, counts = sets(4, 300, 111, [111, 80, 0, 1], device=backend.device)
    check_same_bits(lambda: [backend.gather_tokens(x, keep, counts)])


def test_negative_zero_and_nan_payload(backend):
    x = torch.tensor([[[-0.0, math.nan, -math.nan, 1e-42]]], device=backend.device)
    x.view(torch.int32)[0, 0, 1] = 0x7FA12345
    keep = torch.zeros(1, 1, dtype=torch.int64, device=backend.device)
    got = backend.gather_tokens(x, keep, torch.ones(1, dtype=torch.int32, device=backend.device))
    assert same_bits(got, x)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=dtype_id)
def test_gradient(backend, dtype, align_end):
    """Gradients are scattered to the source rows; repeated rows get the sum, out-of-range ones zero."""
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


def test_gradcheck(backend, align_end):
    """In float64, against finite differences."""
    x = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(backend.device)
    keep = torch.tensor([[1, 1, 5], [0, 4, -1]], device=backend.device)
    counts = torch.tensor([3, 2], dtype=torch.int32, device=backend.device)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: backend.gather_tokens(v, keep, counts, align_end=align_end), (x,))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("capacity", [0, 3])
def test_empty_gradients(backend, shape, capacity):
    x = torch.zeros(shape, device=backend.device, requires_grad=True)
    keep = torch.zeros(shape[0], capacity, dtype=torch.int64, device=backend.device)
    counts = torch.full((shape[0],), capacity, dtype=torch.int32, device=backend.device)
    backend.gather_tokens(x, keep, counts).sum().backward()
    assert x.grad.shape == x.shape
    if x.numel():
        assert float(x.grad.sum()) == capacity * math.prod((shape[0], *shape[2:]))


def test_integers_have_no_gradient(backend):
    """Integer inputs give results that require no gradient."""
    given = sample("gather_tokens", backend.device)
    given["x"] = given["x"].long()
    assert not backend.gather_tokens(**given).requires_grad


# ---------------------------------------------------------------------------------------------- invalid arguments

REFUSALS = {
    "gather_tokens": {
        "x": {"rank 1": to_shape(10), "rank 0": to_shape(), "last dimension with gaps": with_gaps},
        "keep": {
            "int32": to_dtype(torch.int32),
            "float32": to_dtype(torch.float32),
            "rank 1": to_shape(4),
            "rank 3": to_shape(2, 4, 1),
            "another batch": to_shape(3, 4),
            "last dimension with gaps": with_gaps,
        },
        "counts": {**dtypes_but(torch.int32), "rank 2": to_shape(2, 1), "another batch": to_shape(3)},
    },
}
