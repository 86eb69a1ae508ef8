# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs require: decode steps read their requests' remaining lengths from the buffers that were captured."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import graphs_on_cpu
from engines import ASKS, PLANS, engine, generate, scheduler

NEW = 20


@pytest.mark.parametrize("attention", ["FLASH_ATTN", "FLASH_ATTN 2"])
@pytest.mark.parametrize("name", ["budgets", "all by thresholds"])
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
