# SPDX-License-Identifier: Apache-2.0
"""vLLM's tokens equal those of the transformers integration with the same plan."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import tiny
from engines import (
    ASKS,
    BUDGETS,
    KEEP_ALL,
    PAGE_SIZE,
    PLANS,
    Ask,
    drop_record,
    engine,
    free_blocks,
    generate,
    recorded_preemptions,
    scheduler,
)

NEW = 20
OTHERS = [
    (1, "FLASH_ATTN", "all by thresholds"),
    (2, "FLASH_ATTN 2", "all stages"),
    (2, "FLASH_ATTN 4", "budgets"),
    (2, "CPU_ATTN", "all stages"),
    (1, "FLASHINFER 10", "all stages"),
    (2, "FLASHINFER", "budgets"),
    (2, "FLASHINFER", "all by thresholds"),
]


def check_tokens(plan, checkpoint, transformers_of):
    expected = [transformers_of.generate(ask, plan, NEW) for ask in ASKS]
    with engine(checkpoint, plan) as llm:
        free = free_blocks(llm)
        assert generate(llm, ASKS, NEW) == [tokens for tokens, _ in expected]
        # Each prompt gave back as many blocks as its dropped tokens had emptied, and all are free again.
        assert scheduler(llm).released_blocks == sum(dropped // PAGE_SIZE for _, dropped in expected)
        assert free_blocks(llm) == free
        for ask, (tokens, _) in zip(ASKS, expected, strict=True):
            assert generate(llm, [ask], NEW) == [tokens]
        assert generate(llm, ASKS[1:2], 1)  # after this step the worker knows of all ended requests
        assert set(drop_record(llm).dropped.values()) == set()
    assert any(dropped > 0 for _, dropped in expected)


@pytest.mark.parametrize("name", PLANS)
def test_tokens_equal_transformers(name, checkpoint, transformers_of):
    check_tokens(PLANS[name], checkpoint, transformers_of)


@pytest.mark.parametrize(("runner", "attention", "name"), OTHERS)
def test_other_platforms(runner, attention, name, checkpoint, transformers_of):
    with gpu_backends.platform(runner, attention):
        check_tokens(PLANS[name], checkpoint, transformers_of)


@pytest.mark.parametrize(("runner", "attention"), [(1, "FLASHINFER"), (2, "FLASHINFER"), (2, "FLASHINFER 9")])
def test_prompts_of_one_remaining_row(runner, attention, checkpoint, transformers_of):
    """They are decoding requests to a backend that splits a batch by rows, before, between or after longer prompts."""
    plan, short = {**BUDGETS, "pruning_layers": [1, 4], "budgets": [50, 0]}, Ask("<image>a", (0,))
    batches = [[ASKS[2], short, ASKS[3]], [short, Ask("a"), ASKS[1]], [short, short]]
    expected = [[transformers_of.generate(ask, plan, NEW) for ask in batch] for batch in batches]
    assert expected[1][0][1] == len(transformers_of.ids(short)) - 1
    with gpu_backends.platform(runner, attention), engine(checkpoint, plan) as llm:
        for batch, answers in zip(batches, expected, strict=True):
            assert generate(llm, batch, NEW) == [tokens for tokens, _ in answers]


@pytest.mark.parametrize(("runner", "name"), [(1, "all stages"), *((2, name) for name in tiny.PLANS)])
def test_interpreted_kernels(runner, name, tiny_checkpoint, tiny_transformers):
    """TRITON_ATTN, whose kernels take a second each in Triton's interpreter: a smaller model and fewer requests."""
    plan, asks, new = tiny.PLANS[name], tiny.ASKS, 4
    expected = [tiny_transformers.generate(ask, plan, new) for ask in asks]
    with gpu_backends.platform(runner, "TRITON_ATTN"), engine(tiny_checkpoint, plan, block_size=16) as llm:
        assert generate(llm, asks, new) == [tokens for tokens, _ in expected]
        assert scheduler(llm).released_blocks == sum(dropped // 16 for _, dropped in expected) > 0


def test_interpreted_kernels_in_a_small_pool(tiny_checkpoint, tiny_transformers):
    """More prompts run at once than the pool could hold with every token, and preempted ones read again."""
    plan, new, size, pool = tiny.PLANS["budgets"], 14, 16, 9  # blocks of the pool, one of which vLLM keeps
    asks = [tiny.TinyAsk("USER: <image>\ncar? ASSISTANT:", (seed,)) for seed in range(3)]
    expected = [tiny_transformers.generate(ask, plan, new)[0] for ask in asks]
    settings = dict(block_size=size, num_gpu_blocks_override=pool, max_model_len=96, max_num_seqs=4)
    with (
        gpu_backends.platform(2, "TRITON_ATTN"),
        engine(tiny_checkpoint, plan, **settings) as llm,
        recorded_preemptions(llm) as preempted,
    ):
        free, most, schedule = free_blocks(llm), 0, scheduler(llm).schedule

        def counted(*args, **kwargs):
            nonlocal most
            planned = schedule(*args, **kwargs)
            most = max(most, len(planned.num_scheduled_tokens))
            return planned

        scheduler(llm).schedule = counted
        assert generate(llm, asks, new) == expected
        assert most * -(-len(tiny_transformers.ids(asks[0])) // size) > free == pool - 1
        assert preempted
        assert free_blocks(llm) == free


def test_drops_are_not_whole_blocks(transformers_of):
    """The plans above would also pass with rounding if every drop were a multiple of a block."""
    assert any(transformers_of.generate(ask, BUDGETS, NEW)[1] % PAGE_SIZE for ask in ASKS[:4])


def test_keep_all_equals_plain_vllm(checkpoint):
    with engine(checkpoint, None) as llm:
        plain = generate(llm, ASKS, NEW)
    with engine(checkpoint, KEEP_ALL) as llm:
        assert generate(llm, ASKS, NEW) == plain
        assert scheduler(llm).released_blocks == 0
