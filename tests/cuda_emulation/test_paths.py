# SPDX-License-Identifier: Apache-2.0
"""Ways through the launchers that only large inputs take, and devices of other sizes: against the reference."""

from __future__ import annotations

import pytest
import torch

import cuda_emulation
from mustdrop_kernels import backends

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

emulated = cuda_emulation.emulated().implementation
reference = backends.registered()["reference"].implementation


@pytest.fixture(params=[80, 90, 120])
def device(request) -> int:
    cuda_emulation.configure(request.param, request.param)
    return request.param


def groups(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    """Pairs of neighbours in a row that are alike, to a degree of their own, or not."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, height * width // 2, 1, channels, generator=generator)
    noise = torch.randn(batch, height * width // 2, 2, channels, generator=generator)
    x = base + noise * torch.rand(batch, height * width // 2, 1, 1, generator=generator) * 2
    return x.reshape(batch, height * width, channels)


@pytest.mark.parametrize(
    "options",
    [{}, {"merged_first": True}, {"uniform": True}, {"uniform": True, "merged_first": True}, {"budget": 300}],
    ids=str,
)
def test_more_windows_than_a_block_ranks(device, options):
    x = groups(2, 33, 32, 8)
    asked = {"budget": None, "uniform": False, "num_prefix_tokens": 0, "sizes": None, "merged_first": False} | options
    got = emulated("spatial_merge")(x, [33, 32], [1, 2], 0.8, **asked)
    want = reference("spatial_merge")(x, [33, 32], [1, 2], 0.8, **asked)
    assert 500 < want[1].min() < 1000
    for name, a, b in zip(("tokens", "counts", "source", "sizes"), got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


def test_more_patches_than_each_block_assigns(device):
    x = groups(1, 65, 64, 4)
    asked = {"budget": None, "uniform": False, "num_prefix_tokens": 0, "sizes": None, "merged_first": False}
    got = emulated("spatial_merge")(x, [65, 64], [5, 64], 0.01, **asked)
    want = reference("spatial_merge")(x, [65, 64], [5, 64], 0.01, **asked)
    assert torch.equal(got[2], want[2])
    assert torch.allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [30_000, 45_001])
def test_long_rows(device, length):
    """A cluster, keys that fit into a block's shared memory, keys that do not."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, length, generator=generator).round(decimals=3)  # with ties
    types = torch.randint(0, 4, (1, length), generator=generator, dtype=torch.uint8)
    options = {"budgets": None, "protected": None, "capacity": None, "drop_multiple": 16}
    got = emulated("select_topk")(scores, types, 700, **options)
    want = reference("select_topk")(scores, types, 700, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_long_rows_without_a_search(device):
    """Nothing to rank: the blocks of a cluster exchange one sum right after the other."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 22_000, generator=generator)
    types = torch.randint(0, 4, (1, 22_000), generator=generator, dtype=torch.uint8)
    options = {"protected": None, "capacity": None, "drop_multiple": 1}
    got = emulated("select_dual")(scores, scores, types, 0.5, 0.5, **options)
    want = reference("select_dual")(scores, scores, types, 0.5, 0.5, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("align_end", [False, True])
def test_long_caches(device, align_end):
    """More moves than are looked up together."""
    generator = torch.Generator().manual_seed(2)
    length, counts = 3000, torch.tensor([2400], dtype=torch.int32)
    keep = torch.randperm(length, generator=generator)[:2400].sort().values[None]
    caches = [torch.randn(1, 1, length, 16, generator=generator) for _ in range(2)]
    mine = [cache.clone() for cache in caches]
    emulated("compact_kv_")(mine[:1], mine[1:], [keep], [counts], align_end=align_end)
    for before, after in zip(caches, mine, strict=True):
        kept = after[:, :, -2400:] if align_end else after[:, :, :2400]
        assert torch.equal(kept, before[:, :, keep[0]])
