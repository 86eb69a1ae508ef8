# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a GPU: baselines that cannot be captured leave the process sound; rows tell how they were timed."""

from __future__ import annotations

import json

import pytest
import torch

from mustdrop_kernels.bench import capture
from mustdrop_kernels.bench.cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def sound() -> bool:
    """A graph can be captured, the default generator draws, the allocator gives memory back."""
    graph, _ = capture.capture(lambda: torch.ones(4, device="cuda") + 1, lambda: None)
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
    torch.cuda.empty_cache()
    return graph is not None and torch.cuda.memory_reserved() == before


SYNCHRONIZE = [
    lambda x: x.sum().item(),
    lambda x: x.nonzero(),
    lambda x: x.unique(),
    lambda x: x + torch.arange(4.0).to("cuda"),
    lambda x: x + torch.arange(4.0).to("cuda", non_blocking=True),
]


@pytest.mark.parametrize("call", SYNCHRONIZE)
def test_what_synchronizes_is_found_before_a_capture(call):
    x = torch.arange(4.0, device="cuda")
    call(x)
    assert capture.why_not(lambda: call(x))
    assert sound()


@pytest.mark.parametrize("call", SYNCHRONIZE[:4])
def test_a_capture_that_fails_leaves_the_process_sound(call):
    x = torch.arange(4.0, device="cuda")
    before = torch.cuda.current_stream()
    graph, reason = capture.capture(lambda: call(x), lambda: None)
    assert graph is None
    assert "capture failed" in reason
    assert torch.cuda.current_stream() == before
    assert sound()


def test_a_quick_run_of_everything(mustdrop, tmp_path):
    path = tmp_path / "quick.json"
    result = mustdrop("bench", "ops", "--device", "cuda", "--quick", "--shapes", "tiny", "--json", path)
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    timed = [row for row in document["rows"] if row["status"] == "timed"]
    assert {row["op"] for row in timed if row["kind"] == "backend"} == set(CASES)
    assert {row["how"] for row in timed if row["kind"] == "backend"} == {"graph"}
    assert all(row["why_eager"] for row in timed if row["how"] == "eager")
    assert sound()
