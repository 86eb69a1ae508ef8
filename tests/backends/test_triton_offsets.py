# SPDX-License-Identifier: Apache-2.0
"""Offsets that exceed 32 bits, for every stride that a kernel uses.

The storages have gigabytes of virtual memory, of which only the pages that are written are allocated.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mustdrop_kernels
from mustdrop_kernels.backends import triton as backend

if not backend.interpreted() or backend.version() is None:
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("storages_stay")
TYPES = torch.tensor([[2, 3], [2, 3]], dtype=torch.uint8)
ENDS = torch.tensor([0, 2], dtype=torch.int32)


def far(t: Tensor, axis: int) -> Tensor:
    """The same values with a stride of more than 2**31 elements along ``axis``."""
    strides = list(t.contiguous().stride())
    strides[axis] = 2**31 + 32
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    return torch.empty(span, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


@pytest.fixture
def storages_stay(monkeypatch):
    """Prevent the interpreter from copying each argument's whole storage onto itself."""
    copy = torch.UntypedStorage.copy_

    def copy_unless_same(self, other, *args, **kwargs):
        return self if self.data_ptr() == other.data_ptr() else copy(self, other, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_unless_same)


def equal(got, want) -> None:
    got, want = ((x,) if isinstance(x, Tensor) else x for x in (got, want))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def call(op: str, *args, name: str = "triton", **kwargs):
    return getattr(mustdrop_kernels, op)(*args, **kwargs, backend=name)


def check(op: str, *args, **kwargs) -> None:
    """The results are those of the same call with contiguous tensors."""
    near_args, near = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
    equal(call(op, *args, **kwargs), call(op, *near_args, **near))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather(axis):
    x = torch.randint(0, 256, (2, 2, 2, 3), dtype=torch.uint8)
    keep, counts = torch.tensor([[1, 0], [1, -1]]), torch.tensor([2, 1], dtype=torch.int32)
    want = call("gather_tokens", x, keep, counts, name="reference")
    equal(call("gather_tokens", far(x, axis), keep, counts), want)
    if axis == 0:
        equal(call("gather_tokens", x, far(keep, 0), far(counts, 0)), want)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("paged", [False, True])
def test_compaction(axis, paged):
    cache = torch.randint(0, 256, (2, 2, 2, 3), dtype=torch.uint8)
    keep = [torch.tensor([[1]])] if paged else [torch.tensor([[1], [1]])]
    counts, table = [torch.ones(len(keep[0]), dtype=torch.int32)], torch.tensor([[1, 0]], dtype=torch.int32)
    results = []
    for name, key, value in (
        ("reference", cache.clone(), cache.clone()),
        ("triton", far(cache, axis), far(cache, axis)),
    ):
        if paged:
            call("compact_paged_kv_", [key], [value], table, keep, counts, name=name)
            results.append((key[1, :1], value[1, :1]))
        else:
            call("compact_kv_", [key], [value], keep, counts, name=name)
            results.append((key[:, :, :1], value[:, :, :1]))
    equal(*results)


@pytest.mark.parametrize("axis", [0, 1])
def test_compaction_of_heads_with_far_sets(axis):
    cache = torch.randn(2, 2, 5, 3)
    keep, counts = torch.tensor([[[1, 4], [2, 3]], [[3, 4], [0, 4]]]), torch.full((2, 2), 2, dtype=torch.int32)
    results = []
    for name, sets, numbers in (("reference", keep, counts), ("triton", far(keep, axis), far(counts, axis))):
        key, value = cache.clone(), cache + 1
        call("compact_kv_", [key], [value], [sets], [numbers], name=name)
        results.append((key[:, :, :2], value[:, :, :2]))
    equal(*results)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores(axis):
    q, k = torch.randn(2, 2, 2, 4).half(), torch.randn(2, 2, 2, 4).half()
    check("text_vision_scores", far(q, axis), far(k, axis), TYPES, 0.5)
    if axis == 0:
        check("text_vision_scores", q, k, far(TYPES, 0), 0.5)
    check("text_vision_scores", q, k, TYPES, 0.5, lse=far(torch.rand(2, 2, 2), axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_maps(axis):
    q, k = torch.randn(2, 2, 2, 4).half(), torch.randn(2, 2, 2, 4).half()
    check("text_vision_attention", far(q, axis), far(k, axis), TYPES, 0.5, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_scores(axis):
    q, k = torch.randn(2, 2, 4).half(), torch.randn(2, 2, 4).half()
    check("text_vision_scores_varlen", far(q, axis), far(k, axis), TYPES[0], ENDS, ENDS, 2, 2, 0.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_paged_scores(axis):
    q, cache = torch.randn(2, 2, 4).half(), torch.randn(2, 2, 2, 4).half()
    table, lengths = torch.tensor([[1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    check("text_vision_scores_paged", q, far(cache, axis), table, lengths, TYPES[:1], ENDS, 2, 0.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cls_attention(axis):
    q, k, counts = torch.randn(2, 2, 4).half(), torch.randn(2, 2, 3, 4).half(), torch.tensor([3, 2], dtype=torch.int32)
    check("cls_attention", q, far(k, axis), 0.5, counts=counts)
    if axis < 2:
        check("cls_attention", far(q, axis), k, 0.5, counts=far(counts, 0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("options", [{}, {"merged_first": True}, {"uniform": True}], ids=str)
def test_merge(axis, options):
    x, sizes = torch.randn(2, 5, 3).half(), torch.rand(2, 5) + 0.5
    check("spatial_merge", far(x, axis), [2, 2], [2, 1], 0.0, sizes=far(sizes, 0), **options)


def test_selection():
    scores, types = far(torch.rand(2, 6).half(), 0), far(torch.full((2, 6), 2, dtype=torch.uint8), 0)
    protected, budgets = far(torch.rand(2, 6) < 0.3, 0), far(torch.tensor([2, 3], dtype=torch.int32), 0)
    check("select_topk", scores, types, 2, protected=protected, budgets=budgets)
    check("select_dual", scores, scores, types, 0.1, 0.9, protected=protected)
