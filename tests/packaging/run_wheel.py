# SPDX-License-Identifier: Apache-2.0
"""Check of an installed wheel for `make test-wheel`: one operator of each stage against the reference."""

from __future__ import annotations

import sys

import torch

import mustdrop_kernels as mk
from mustdrop_kernels import _load


def main() -> None:
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {mk.__file__}")
    assert _load.core.problem is None, _load.core.problem
    if _load.cuda.path.is_file() and torch.version.cuda is not None:
        assert _load.cuda.problem is None, _load.cuda.problem
    _load.nvrtc.load()
    assert _load.nvrtc.problem is None, _load.nvrtc.problem

    x = torch.randn(2, 577, 64)
    merged = torch.ops.mustdrop.spatial_merge(x, [24, 24], [3, 3], 0.0)
    expected = mk.spatial_merge(x, [24, 24], [3, 3], 0.0, backend="reference")
    assert torch.equal(merged[1], expected.counts)
    assert torch.allclose(merged[0], expected.tokens, atol=1e-5)

    q, k = torch.randn(1, 4, 20, 16), torch.randn(1, 4, 20, 16)
    types = torch.tensor([[1] * 5 + [2] * 10 + [3] * 5], dtype=torch.uint8)
    keep, counts, _, _ = torch.ops.mustdrop.dual_attention_select(q, k, types, 0.25, 0.01, 0.01)
    assert torch.equal(keep, mk.dual_attention_select(q, k, types, 0.25, 0.01, 0.01, backend="reference").keep)

    kept = k[:, :, keep[0, : int(counts)]].clone()
    torch.ops.mustdrop.compact_kv_([k], [k.clone()], [keep], [counts])
    assert torch.equal(k[:, :, : int(counts)], kept)
    print("every stage agrees with the reference")


if __name__ == "__main__":
    main()
