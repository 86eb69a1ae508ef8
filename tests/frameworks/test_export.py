# SPDX-License-Identifier: Apache-2.0
"""torch.export and ahead-of-time compilation of a module that calls the operators."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch


class Part(torch.nn.Module):
    """Merge, select, gather."""

    def forward(self, x: torch.Tensor, scores: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, counts, _, _ = torch.ops.mustdrop.spatial_merge(x, [4, 4], [2, 2], budget=2)
        keep, kept = torch.ops.mustdrop.select_topk(scores, types, 3, capacity=5)
        return torch.ops.mustdrop.gather_tokens(tokens, keep, kept) * 2, counts


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    types = torch.full((batch, 11), 2, dtype=torch.uint8)
    types[:, :2] = 1
    return torch.randn(batch, 17, 8), torch.rand(batch, 11), types


def exported() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(Part(), inputs(2), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_export_preserves_the_operators(batch: int, tmp_path: Path) -> None:
    program = exported()
    called = [str(node.target) for node in program.graph.nodes if "mustdrop" in str(node.target)]
    assert called == [f"mustdrop.{op}.default" for op in ("spatial_merge", "select_topk", "gather_tokens")]
    torch.export.save(program, tmp_path / "part.pt2")
    arguments = inputs(batch)
    assert same(torch.export.load(tmp_path / "part.pt2").module()(*arguments), Part()(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time(tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "part.pt2"))
    part = torch._inductor.aoti_load_package(path)
    for batch in (2, 3):
        arguments = inputs(batch)
        assert same(tuple(part(*arguments)), Part()(*arguments))
