# SPDX-License-Identifier: Apache-2.0
"""Caches of all types: compaction moves rows bit for bit, with their scales."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import tiny
import torch
from engines import ASKS, BUDGETS, compare_with_plain, engine, generate, scheduler
from vllm import SamplingParams

NEW = 8
PLAN = {"merge": False, "key_rate": 0.0, "pruning_layers": [1, 2], "budgets": [20, 9]}
CPU, FLASH, TRITON = (1, "CPU_ATTN"), (2, "FLASH_ATTN"), (2, "TRITON_ATTN")
CACHES = [
    (CPU, "float32", "auto"),
    (CPU, "float16", "auto"),
    (CPU, "float32", "fp8"),
    (FLASH, "bfloat16", "auto"),
    (FLASH, "float32", "fp8"),
    ((2, "FLASHINFER"), "float32", "fp8"),
    ((2, "FLASHINFER 10"), "bfloat16", "auto"),  # heads before slots
    (TRITON, "float16", "auto"),
    (TRITON, "float32", "int8_per_token_head"),
    (TRITON, "float32", "fp8_per_token_head"),
]


def rows(llm, request, count, lost=0):
    """Bytes of the `count` tokens that a running request holds, per layer and for keys and values."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    (blocks,) = scheduler(llm).kv_cache_manager.get_block_ids(request)
    place = torch.arange(count)
    page = torch.tensor(blocks)[lost // model.block_size + place // model.block_size]
    found = [x[page, place % model.block_size] for views in model.attention.caches() for x in views]
    return [x.contiguous().view(torch.uint8) for x in found]


@contextlib.contextmanager
def recorded_plans(llm):
    """The plans of the prompts that begin in the block."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    run, plans = model._prefill.run, []

    def recorded(*args, **kwargs):
        final, plan = run(*args, **kwargs)
        plans.append(plan)
        return final, plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._prefill, "run", recorded)
        yield plans


@pytest.mark.parametrize(("platform", "dtype", "kind"), CACHES)
def test_rows_move_bit_for_bit(platform, dtype, kind, tiny_checkpoint):
    """The prompt of a picture, plainly and with dropped tokens: layers before the first drop hold the same rows."""
    settings = dict(dtype=dtype, kv_cache_dtype=kind, block_size=32, max_num_seqs=2, async_scheduling=False)
    with gpu_backends.platform(*platform, asynchronous=False), engine(tiny_checkpoint, PLAN, **settings) as llm:
        core, held = llm.llm_engine, []
        for name, value in (("plain", False), ("dropped", True)):
            sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, extra_args={"mustdrop": value})
            with recorded_plans(llm) as plans:
                core.add_request(name, tiny.ASKS[0].for_vllm(), sampling)
                core.step()
            (request,) = scheduler(llm).running
            lost = plans[0].dropped[0] if plans else 0
            held.append(rows(llm, request.request_id, request.num_prompt_tokens - lost, lost))
            while core.has_unfinished_requests():
                core.step()
        kept = plans[0].tokens.index[0, : len(held[1][0])]
        first, layers = PLAN["pruning_layers"][0] + 1, tiny.LAYERS
        for before, after in zip(held[0], held[1], strict=True):
            assert len(before) > len(after) == len(kept)
        for i in (*range(first), *range(layers, layers + first)):  # keys, then values
            assert held[1][i].any()
            assert torch.equal(held[0][i][kept], held[1][i])


@pytest.mark.parametrize(("platform", "skipped"), [(CPU, []), (FLASH, ["0", "3"])])
def test_tokens_with_quantised_caches(platform, skipped, checkpoint):
    """Keep-all equals plain vLLM, and with dropped tokens no request depends on the batch; in all layers or in some."""
    settings = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": skipped}
    with gpu_backends.platform(*platform):
        plain, dropped = compare_with_plain(
            checkpoint, lambda llm, asks: generate(llm, asks, NEW), ASKS, BUDGETS, **settings
        )
    assert dropped[1] == plain[1]
