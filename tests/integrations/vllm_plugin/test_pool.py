# SPDX-License-Identifier: Apache-2.0
"""Pools that are too small: more requests fit, preempted ones read again, aborted ones leave nothing behind."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, Ask, engine, free_blocks, ledger, sampling, scheduler

POOL = 15  # blocks, one of which vLLM keeps; a prompt with an image takes 6 of them, and 2 after dropping
PICTURES = [ASKS[0], ASKS[2], Ask("USER: <image>\nWhat? ASSISTANT:", (2,)), Ask("USER: <image> car? ASSISTANT:", (3,))]


@pytest.fixture(scope="module")
def small(checkpoint):
    with engine(checkpoint, BUDGETS, num_gpu_blocks_override=POOL, max_model_len=256) as llm:
        yield llm


@pytest.fixture
def preemptions(small, monkeypatch):
    """The requests that were preempted, each time."""
    seen = []
    preempt = scheduler(small)._preempt_request

    def recorded(request, *args, **kwargs):
        seen.append(request)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler(small), "_preempt_request", recorded)
    return seen


def run(llm, asks, lengths, abort=None):
    """Steps until all is done. Tokens of each request that ended by itself, and the most that ran at once."""
    core = llm.llm_engine
    numbers = {}
    for i, (ask, length) in enumerate(zip(asks, lengths, strict=True)):
        numbers[core.add_request(f"request-{i}", ask.for_vllm(), sampling(length)) or f"request-{i}"] = i
    done, most, step = {}, 0, 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        most = max(most, len(scheduler(llm).running))
        step += 1
        if abort is not None:
            core.abort_request(abort(step))
    return {int(name.split("-")[1]): tokens for name, tokens in done.items()}, most


def test_more_requests_fit_than_full_prompts_would(small, preemptions, transformers_of):
    free = free_blocks(small)
    done, most = run(small, PICTURES, [20] * 4)
    assert done == {i: transformers_of.generate(ask, BUDGETS, 20)[0] for i, ask in enumerate(PICTURES)}
    assert most > (POOL - 1) // 6  # as many full prompts would fit
    assert not preemptions
    assert free_blocks(small) == free


def test_preempted_requests_read_again(small, preemptions, transformers_of):
    """What they had generated neither votes nor sees tokens that were gone."""
    free = free_blocks(small)
    asks = [*PICTURES, *PICTURES[:2]]
    done, _ = run(small, asks, [70] * 6)
    assert done == {i: transformers_of.generate(ask, BUDGETS, 70)[0] for i, ask in enumerate(asks)}
    assert any(request.num_output_tokens > 0 and request.has_encoder_inputs for request in preemptions)
    assert free_blocks(small) == free


def test_random_requests_and_aborts_leave_the_pool_as_it_was(small, transformers_of):
    choice = random.Random(0)
    free = free_blocks(small)
    asks = [choice.choice([*PICTURES, ASKS[1], ASKS[4]]) for _ in range(200)]
    lengths = [choice.randrange(1, 9) for _ in asks]
    aborted = set()

    def abort(step):
        names = [request.request_id for request in scheduler(small).running]
        names += [request.request_id for request in scheduler(small).waiting]
        chosen = [name for name in names if choice.random() < 0.02]
        aborted.update(chosen)
        return chosen

    done, _ = run(small, asks, lengths, abort)
    for i, tokens in done.items():
        assert tokens == transformers_of.generate(asks[i], BUDGETS, 8)[0][: lengths[i]]
    assert len(done) > 50
    assert len(aborted) > 20
    run(small, [ASKS[1]], [1])  # a step after which the worker has heard of all that ended
    assert free_blocks(small) == free
    assert ledger(small).lost == {}


def test_prompt_logprobs_of_an_image_are_refused(small, transformers_of):
    """The request ends with an error; those beside it and after it do not."""
    from vllm import SamplingParams

    core, free = small.llm_engine, free_blocks(small)
    asking = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    core.add_request("asking-0", PICTURES[0].for_vllm(), asking)
    core.add_request("plain-1", PICTURES[1].for_vllm(), sampling(4))
    done = {}
    while core.has_unfinished_requests():
        done.update({output.request_id: output.outputs[0] for output in core.step() if output.finished})
    ended = {name.split("-")[0]: output for name, output in done.items()}
    assert ended["asking"].finish_reason == "error"
    assert list(ended["plain"].token_ids) == transformers_of.generate(PICTURES[1], BUDGETS, 4)[0]
    assert free_blocks(small) == free
