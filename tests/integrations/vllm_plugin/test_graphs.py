# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs require: decode steps read their requests' remaining lengths from the buffers that were captured."""

from __future__ import annotations

import dataclasses
import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import graphs_on_cpu
import torch
from engines import ASKS, BUDGETS, PLANS, engine, generate, scheduler
from vllm.config import CUDAGraphMode

from mustdrop_kernels.integrations.vllm.dropping import DropTokensMixin
from mustdrop_kernels.integrations.vllm.record import DropRecord
from mustdrop_kernels.integrations.vllm.runner_v2 import MustDropModelState

NEW = 20
CASES = [
    ("FLASH_ATTN", "budgets"),
    ("FLASH_ATTN", "all by thresholds"),
    ("FLASH_ATTN 2", "budgets"),
    ("FLASHINFER", "all by thresholds"),
    ("FLASHINFER 9", "budgets"),
    ("FLASHINFER 10", "all by thresholds"),
]


@pytest.mark.parametrize(("attention", "name"), CASES)
def test_replayed_decode_steps(attention, name, checkpoint, transformers_of):
    """Tokens equal transformers', of batches that are padded to a captured size too."""
    plan = PLANS[name]
    expected = [transformers_of.generate(ask, plan, NEW)[0] for ask in ASKS]
    where = gpu_backends.platform(2, attention, graphs="FULL_DECODE_ONLY")
    with where, engine(checkpoint, plan, enforce_eager=False, compilation_config={"mode": 0}) as llm:
        graphs = graphs_on_cpu.capture(llm)
        assert sorted(graphs) == graphs_on_cpu.SIZES
        assert generate(llm, ASKS, NEW) == expected  # five requests in a graph of eight
        assert graphs[8].replays >= NEW - 5
        for ask, tokens in zip(ASKS, expected, strict=True):
            assert generate(llm, [ask], NEW) == [tokens]
        assert graphs[1].replays == len(ASKS) * (NEW - 1)
        assert scheduler(llm).released_blocks > 0


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_modes_that_would_replay_prompts(mode, checkpoint, transformers_of):
    """vLLM keeps graphs for steps that only decode, since a prompt that loses tokens needs the model's Python code."""
    expected = [transformers_of.generate(ask, BUDGETS, 8)[0] for ask in ASKS]
    where = gpu_backends.platform(2, "FLASH_ATTN", graphs=mode)
    with where, engine(checkpoint, BUDGETS, enforce_eager=False, compilation_config={"mode": 0}) as llm:
        graphs = graphs_on_cpu.capture(llm)
        chosen = llm.llm_engine.model_executor.driver_worker.worker.model_runner.cudagraph_manager.cudagraph_mode
        assert chosen.mixed_mode() != CUDAGraphMode.FULL == chosen.decode_mode()
        assert generate(llm, ASKS, 8) == expected
        assert sum(graph.replays for graph in graphs.values()) > 0


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_pieces_of_a_compiled_model(mode, checkpoint, transformers_of, monkeypatch):
    """Text replays pieces. Prompts that lose tokens do not, in steps that are padded to a captured size either."""
    drop, steps = DropTokensMixin._drop, []

    def recorded(self, step, flags, positions, embeddings, context):
        steps.append((context.cudagraph_runtime_mode, len(embeddings) > step.rows))
        return drop(self, step, flags, positions, embeddings, context)

    monkeypatch.setattr(DropTokensMixin, "_drop", recorded)
    expected = [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in ASKS]
    with gpu_backends.platform(2, "FLASH_ATTN", graphs=mode), engine(checkpoint, BUDGETS, enforce_eager=False) as llm:
        graphs = graphs_on_cpu.capture(llm)
        assert bool(graphs) == (mode == "FULL_AND_PIECEWISE")
        assert generate(llm, ASKS, NEW) == expected
        for ask, tokens in zip(ASKS, expected, strict=True):
            before = graphs_on_cpu.Piece.replays
            assert generate(llm, [ask], NEW) == [tokens]
            assert (graphs_on_cpu.Piece.replays > before) == (mode == "PIECEWISE" or not ask.pictures)
        assert scheduler(llm).released_blocks > 0
    assert (CUDAGraphMode.PIECEWISE, True) in steps


@dataclasses.dataclass
class Batch:
    """The fields of vLLM's InputBatch that a decode step changes or reads, device tensors without contents."""

    req_ids: list
    num_reqs: int
    num_tokens: int
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor


def test_decode_steps_never_read_the_device():
    """Meta tensors have no contents: reading one, or a shape that depends on its contents, raises."""
    count, padded, blocks, meta = 3, 8, 40, torch.device("meta")
    state = object.__new__(MustDropModelState)
    state.device, state.model = meta, types.SimpleNamespace(block_size=16)
    state._record, state._seq_lens = DropRecord(), torch.zeros(16, dtype=torch.int32, device=meta)
    batch = Batch(
        req_ids=["a", "b", "c"],
        num_reqs=count,
        num_tokens=count,
        seq_lens=torch.empty(padded, dtype=torch.int32, device=meta),
        query_start_loc=torch.empty(padded + 1, dtype=torch.int32, device=meta),
        seq_lens_cpu_upper_bound=torch.tensor([200, 30, 41] + [0] * (padded - count), dtype=torch.int32),
    )
    table = torch.empty(padded, blocks, dtype=torch.int32, device=meta)
    slots = torch.empty(padded, dtype=torch.int64, device=meta)
    for lost in ({}, {"a": 124, "c": 32}, {"b": 5}):
        state._record.dropped = lost
        shorter = state._without_lost(batch, table, slots)
        assert shorter.seq_lens._base is state._seq_lens  # the buffer that graphs bind
        assert shorter.seq_lens_cpu_upper_bound[:count].tolist() == [
            length - lost.get(name, 0) for name, length in zip("abc", (200, 30, 41), strict=True)
        ]
    with pytest.raises(RuntimeError, match="meta"):
        slots.tolist()
