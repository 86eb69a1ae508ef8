# SPDX-License-Identifier: Apache-2.0
"""Random arrivals, settings, lengths and aborts in a pool that is too small, on every platform."""

from __future__ import annotations

import random

import gpu_backends
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import (
    ASKS,
    KEEP_ALL,
    PLANS,
    Ask,
    drop_record,
    engine,
    free_blocks,
    generate,
    recorded_preemptions,
    scheduler,
)
from vllm import SamplingParams

PLATFORMS = [
    (1, "CPU_ATTN"),
    (1, "FLASH_ATTN"),
    (1, "FLASHINFER 10"),
    (2, "CPU_ATTN"),
    (2, "FLASH_ATTN 2"),
    (2, "FLASH_ATTN"),
    (2, "FLASHINFER"),
    (2, "FLASHINFER 9"),
    (2, "FLASHINFER 10"),
]
POOL = 12  # blocks, one of which vLLM keeps
ASKED = [*ASKS[:3], ASKS[4], Ask("USER: <image> car? ASSISTANT:", (3,)), Ask("USER: What is on the street? " * 7)]
THRESHOLDS = {"global_threshold": 0.01, "individual_threshold": 0.012}  # no score of these prompts is within rounding
OWN = [
    *[{}] * 4,
    None,  # every token is kept
    {"text_queries": "last"},
    {"pruning_layers": [1, 3], "budgets": [30, 6]},
    {"pruning_layers": [2], "budgets": None, **THRESHOLDS},
]
LONGEST = 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["budgets", "all by thresholds", "all stages"])
@pytest.mark.parametrize(("runner", "attention"), PLATFORMS)
def test_tokens_equal_transformers(runner, attention, name, checkpoint, transformers_of):
    choice = random.Random(f"{runner} {attention} {name}")
    requests = [(choice.choice(ASKED), choice.choice(OWN), choice.choice([1, 2, 3, 8, LONGEST])) for _ in range(60)]
    settings = dict(num_gpu_blocks_override=POOL, max_model_len=256)
    with (
        gpu_backends.platform(runner, attention),
        engine(checkpoint, PLANS[name], **settings) as llm,
        recorded_preemptions(llm) as preempted,
    ):
        core, free, waiting, done = llm.llm_engine, free_blocks(llm), list(enumerate(requests)), {}
        while waiting or core.has_unfinished_requests():
            while waiting and choice.random() < 0.6:
                number, (ask, own, length) = waiting.pop(0)
                extra_args = {} if own == {} else {"mustdrop": own or False}
                sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra_args)
                core.add_request(f"{number}", ask.for_vllm(), sampling)
            done |= {int(o.request_id): list(o.outputs[0].token_ids) for o in core.step() if o.finished}
            core.abort_request([r.request_id for r in scheduler(llm).running if choice.random() < 0.002], internal=True)
        assert generate(llm, ASKED[1:2], 1)  # after this step the worker knows of all ended requests
        assert (free_blocks(llm), drop_record(llm).dropped) == (free, {})
    assert preempted
    assert len(requests) * 0.8 < len(done) <= len(requests)
    for number, tokens in done.items():
        ask, own, length = requests[number]
        plan = KEEP_ALL if own is None else {**PLANS[name], **own}
        assert tokens == transformers_of.generate(ask, plan, LONGEST)[0][:length], requests[number]
