# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding that drafts from the text of a request."""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import gpu_backends
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, PLANS, Ask, engine, free_blocks, generate, scheduler

NEW = 24
ASKED = [*ASKS, Ask("USER: a car a car a car a car a car a car ASSISTANT: a car a car")]
V1 = gpu_backends.DEFAULT.startswith("1")
DRAFTS = {"all stages": "ngram"} if V1 else {"budgets": "ngram", "all stages": "ngram_gpu"}


def check_tokens(checkpoint, plan, method, expected):
    drafts = {"method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(checkpoint, plan, speculative_config=drafts) as llm:
        free, counts = free_blocks(llm), []
        make = scheduler(llm).make_spec_decoding_stats

        def counted(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
            counts.append((num_draft_tokens, num_accepted_tokens))
            return make(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        scheduler(llm).make_spec_decoding_stats = counted
        assert generate(llm, ASKED, NEW) == expected
        assert [generate(llm, [ask], NEW)[0] for ask in ASKED] == expected
        drafted, accepted = map(sum, zip(*counts, strict=True))
        assert 0 < accepted < drafted
        assert scheduler(llm).released_blocks > 0
        assert free_blocks(llm) == free


@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_equal_transformers(name, checkpoint, transformers_of):
    expected = [transformers_of.generate(ask, PLANS[name], NEW)[0] for ask in ASKED]
    arguments = checkpoint, PLANS[name], DRAFTS[name], expected
    if V1:  # it loads numba, in whose presence vLLM 0.32 cannot start a second engine in a process
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            pool.submit(check_tokens, *arguments).result()
    else:
        check_tokens(*arguments)
