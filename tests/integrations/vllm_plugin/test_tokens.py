# SPDX-License-Identifier: Apache-2.0
"""vLLM's tokens equal those of the transformers integration with the same plan."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, KEEP_ALL, PAGE_SIZE, PLANS, drop_record, engine, free_blocks, generate, scheduler

NEW = 20


@pytest.mark.parametrize("name", PLANS)
def test_tokens_equal_transformers(name, checkpoint, transformers_of):
    plan = PLANS[name]
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


def test_drops_are_not_whole_blocks(transformers_of):
    """The plans above would also pass with rounding if every drop were a multiple of a block."""
    assert any(transformers_of.generate(ask, BUDGETS, NEW)[1] % PAGE_SIZE for ask in ASKS[:4])


def test_keep_all_equals_plain_vllm(checkpoint):
    with engine(checkpoint, None) as llm:
        plain = generate(llm, ASKS, NEW)
    with engine(checkpoint, KEEP_ALL) as llm:
        assert generate(llm, ASKS, NEW) == plain
        assert scheduler(llm).released_blocks == 0
