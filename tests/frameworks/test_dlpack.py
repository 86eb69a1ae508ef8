# SPDX-License-Identifier: Apache-2.0
"""Arrays of other frameworks, exchanged with DLPack without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mustdrop_kernels as mk


def test_numpy_both_ways() -> None:
    x = np.random.default_rng(0).standard_normal((1, 17, 8), dtype=np.float32)
    shared = torch.from_dlpack(x)
    assert shared.data_ptr() == x.ctypes.data
    merged = torch.ops.mustdrop.spatial_merge(shared, [4, 4], [2, 2], 0.0)
    tokens = np.from_dlpack(merged[0])
    assert tokens.ctypes.data == merged[0].data_ptr()
    assert np.array_equal(tokens[:, 0], x[:, 0])  # the prefix token is unchanged


def test_a_numpy_cache_is_compacted_in_place() -> None:
    cache = np.arange(2 * 6 * 4, dtype=np.float32).reshape(1, 2, 6, 4)
    kept = cache[:, :, [0, 3, 5]].copy()
    keep, counts = torch.tensor([[0, 3, 5]]), torch.tensor([3], dtype=torch.int32)
    keys, values = torch.from_dlpack(cache), torch.zeros(1, 2, 6, 4)
    torch.ops.mustdrop.compact_kv_([keys], [values], [keep], [counts])
    assert np.array_equal(cache[:, :, :3], kept)


def test_jax_both_ways() -> None:
    jax = pytest.importorskip("jax")
    x = jax.random.normal(jax.random.key(0), (1, 17, 8))
    shared = torch.from_dlpack(x)
    assert shared.data_ptr() == x.unsafe_buffer_pointer()
    merged = torch.ops.mustdrop.spatial_merge(shared, [4, 4], [2, 2], 0.0)
    tokens = jax.numpy.from_dlpack(merged[0])
    assert tokens.unsafe_buffer_pointer() == merged[0].data_ptr()
    expected = mk.spatial_merge(torch.tensor(np.asarray(x)), [4, 4], [2, 2], 0.0, backend="reference")
    assert np.allclose(tokens, expected.tokens.numpy(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CuPy's arrays require a GPU")
def test_cupy_both_ways() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.random.standard_normal((1, 17, 8), dtype=cupy.float32)
    shared = torch.from_dlpack(x)
    assert shared.data_ptr() == x.data.ptr
    merged = torch.ops.mustdrop.spatial_merge(shared, [4, 4], [2, 2], 0.0)
    tokens = cupy.from_dlpack(merged[0])
    assert tokens.data.ptr == merged[0].data_ptr()
    assert cupy.array_equal(tokens[:, 0], x[:, 0])
