# SPDX-License-Identifier: Apache-2.0
"""Pools that are too small: more requests fit, preempted ones read again, aborted ones free everything."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import (
    ASKS,
    BUDGETS,
    PAGE_SIZE,
    Ask,
    drop_record,
    engine,
    free_blocks,
    recorded_preemptions,
    sampling,
    scheduler,
)

from mustdrop_kernels.integrations.vllm.blocks import shares_blocks

POOL = 15  # blocks, one of which vLLM keeps; a prompt with an image takes 6 of them, and 2 after dropping
LONG = Ask("USER: What is on the street? " * 7 + "ASSISTANT:")  # text of more than two blocks
PICTURES = [ASKS[0], ASKS[2], Ask("USER: <image>\nWhat? ASSISTANT:", (2,)), Ask("USER: <image> car? ASSISTANT:", (3,))]


@pytest.fixture(scope="module")
def small(checkpoint):
    with engine(checkpoint, BUDGETS, num_gpu_blocks_override=POOL, max_model_len=256) as llm:
        yield llm


@pytest.fixture
def preemptions(small):
    with recorded_preemptions(small) as seen:
        yield seen


def run(llm, asks, lengths, abort=None):
    """Steps until all is done. Tokens of each request that ended by itself, and the most that ran at once."""
    core = llm.llm_engine
    for i, (ask, length) in enumerate(zip(asks, lengths, strict=True)):
        core.add_request(f"request-{i}", ask.for_vllm(), sampling(length))
    done, most, step = {}, 0, 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        most = max(most, len(scheduler(llm).running))
        step += 1
        if abort is not None:
            core.abort_request(abort(step), internal=True)
    return {number(name): tokens for name, tokens in done.items()}, most


def number(request):
    """The number in a request's id, vLLM's or ours."""
    return int(request.split("-")[1])


def test_more_requests_fit_than_full_prompts_would(small, preemptions, transformers_of):
    free = free_blocks(small)
    done, most = run(small, PICTURES, [20] * 4)
    assert done == {i: transformers_of.generate(ask, BUDGETS, 20)[0] for i, ask in enumerate(PICTURES)}
    assert most > (POOL - 1) // 6  # as many full prompts would fit
    assert not preemptions
    assert free_blocks(small) == free


def test_preempted_requests_read_again(small, preemptions, transformers_of):
    """Their generated tokens are no text queries and do not attend to tokens that had been dropped."""
    free = free_blocks(small)
    asks = [*PICTURES, *PICTURES[:2]]
    done, _ = run(small, asks, [70] * 6)
    assert done == {i: transformers_of.generate(ask, BUDGETS, 70)[0] for i, ask in enumerate(asks)}
    assert any(request.num_output_tokens > 0 and request.has_encoder_inputs for request in preemptions)
    assert free_blocks(small) == free


def test_random_requests_and_aborts_leave_the_pool_as_it_was(small, preemptions, transformers_of):
    choice = random.Random(0)
    free = free_blocks(small)
    asks = [choice.choice([*PICTURES, ASKS[1], ASKS[4], LONG]) for _ in range(200)]
    lengths = [choice.choice([1, 2, 3, 5, 8, 13, 60]) for _ in asks]
    aborted = set()

    def abort(step):
        names = [request.request_id for request in scheduler(small).running]
        names += [request.request_id for request in scheduler(small).waiting]
        chosen = [name for name in names if choice.random() < 0.004]
        aborted.update(map(number, chosen))
        return chosen

    done, _ = run(small, asks, lengths, abort)
    for i, tokens in done.items():
        assert tokens == transformers_of.generate(asks[i], BUDGETS, 60)[0][: lengths[i]]
    assert set(done) == set(range(200)) - aborted
    assert 20 < len(aborted) < 150
    assert {request.has_encoder_inputs for request in preemptions} == {False, True}
    run(small, [ASKS[1]], [1])  # a step after which the worker has heard of all that ended
    assert free_blocks(small) == free
    assert drop_record(small).dropped == {}


def test_text_shares_blocks_and_pictures_do_not(small, transformers_of):
    """The contents of a picture's blocks depend on the text after them."""
    core = small.llm_engine
    assert core.vllm_config.cache_config.enable_prefix_caching
    run(small, [LONG, PICTURES[0]], [1, 1])
    asks = [LONG, PICTURES[0], LONG, PICTURES[0]]
    for i, ask in enumerate(asks):
        core.add_request(f"twice-{i}", ask.for_vllm(), sampling(6))
    found, sharing, manager = {}, [], scheduler(small).kv_cache_manager
    while core.has_unfinished_requests():
        outputs = core.step()
        sharing += [request for request in scheduler(small).running if shares_blocks(manager, request.request_id)]
        found.update({number(output.request_id): output for output in outputs if output.finished})
    assert {request.has_encoder_inputs for request in sharing} == {False}
    for i, ask in enumerate(asks):
        assert list(found[i].outputs[0].token_ids) == transformers_of.generate(ask, BUDGETS, 6)[0]
        assert found[i].num_cached_tokens == (0 if ask.pictures else 2 * PAGE_SIZE)


def test_shared_blocks_are_never_compacted(small, monkeypatch, transformers_of):
    """The engine stops before it would compact a shared block of a picture."""
    core, free = small.llm_engine, free_blocks(small)
    taken = []

    def allocate(request, *args, **kwargs):
        blocks = plain(request, *args, **kwargs)
        taken.append(blocks.blocks[0][2])
        pool.touch(taken)
        return blocks

    manager = scheduler(small).kv_cache_manager
    plain, pool = manager.allocate_slots, manager.block_pool
    monkeypatch.setattr(manager, "allocate_slots", allocate)
    core.add_request("shared-0", PICTURES[0].for_vllm(), sampling(4))
    with pytest.raises(RuntimeError, match="has blocks of another, which cannot be compacted"):
        core.step()
    monkeypatch.undo()
    pool.free_blocks(taken)
    core.abort_request([request.request_id for request in scheduler(small).running], internal=True)
    core.reset_encoder_cache()  # the picture was to be encoded in the step that was not run
    assert run(small, PICTURES[:1], [4])[0] == {0: transformers_of.generate(PICTURES[0], BUDGETS, 4)[0]}
    assert free_blocks(small) == free
