# SPDX-License-Identifier: Apache-2.0
"""Prompts with images that keep every token, beside others that lose some."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, KEEP_ALL, PLANS, engine, free_blocks, generate, sampling, scheduler
from vllm import SamplingParams

from mustdrop_kernels.integrations.vllm import scheduler as rules

NEW = 12
TWO_IMAGES = 3  # of ASKS: 305 tokens; the others have at most 156
SHORT_STEPS = [
    dict(max_num_batched_tokens=192, max_num_seqs=4),  # three requests decode beside a prompt
    dict(max_num_scheduled_tokens=192, max_num_seqs=4),
    dict(long_prefill_token_threshold=192),
]


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the scheduler."""
    said = []
    monkeypatch.setattr(rules.logger, "warning", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize("name", ["budgets", "all stages"])
@pytest.mark.parametrize("settings", SHORT_STEPS)
def test_prompts_that_do_not_fit_a_step(settings, name, checkpoint, transformers_of, warnings):
    """They are read in chunks. A picture of both kinds of prompts is encoded once with stage 1 and once without."""
    plans = [KEEP_ALL if i == TWO_IMAGES else PLANS[name] for i in range(len(ASKS))]
    expected = [transformers_of.generate(ask, plan, NEW)[0] for ask, plan in zip(ASKS, plans, strict=True)]
    with engine(checkpoint, PLANS[name], **settings) as llm:
        free = free_blocks(llm)
        assert generate(llm, ASKS, NEW) == expected
        assert generate(llm, ASKS[::-1], NEW) == expected[::-1]
        assert scheduler(llm).plain_prompts == 2
        assert scheduler(llm).released_blocks > 0
        assert free_blocks(llm) == free
    (said,) = warnings
    assert "has 305 tokens: raise max_num_batched_tokens" in said


def test_steps_shorter_than_an_image(checkpoint, transformers_of):
    """Chunks that end inside an image."""
    expected = [transformers_of.generate(ask, KEEP_ALL, NEW)[0] for ask in ASKS]
    with engine(checkpoint, PLANS["key tokens"], max_num_batched_tokens=64, max_num_seqs=4) as llm:
        assert generate(llm, ASKS, NEW) == expected
        assert scheduler(llm).released_blocks == 0


@pytest.mark.parametrize("name", ["budgets", "all stages"])
def test_log_probabilities_of_the_prompt(name, checkpoint, transformers_of):
    """A prompt whose log probabilities are asked for keeps all its tokens; the others do not."""
    asking = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=2, logprobs=2)
    parameters = [asking, sampling(NEW), asking, sampling(NEW)]
    asked = [ASKS[0], ASKS[0], ASKS[TWO_IMAGES], ASKS[2]]
    prompts = [ask.for_vllm() for ask in asked]
    with engine(checkpoint, None) as llm:
        plain = llm.generate(prompts, asking, use_tqdm=False)
    with engine(checkpoint, PLANS[name]) as llm:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
    for output, reference, wanted, ask in zip(outputs, plain, parameters, asked, strict=True):
        tokens = list(output.outputs[0].token_ids)
        if wanted is asking:
            assert tokens == list(reference.outputs[0].token_ids)
            assert logprobs(output) == logprobs(reference)
        else:
            assert tokens == transformers_of.generate(ask, PLANS[name], NEW)[0]


def logprobs(output):
    known = [place for place in output.prompt_logprobs if place is not None]
    assert len(known) == len(output.prompt_token_ids) - 1
    return [{token: pytest.approx(p.logprob, abs=1e-3) for token, p in place.items()} for place in known]


def test_plain_prompts_share_their_prefix(checkpoint, transformers_of):
    """As in plain vLLM; those that lose tokens share nothing with them."""
    plain = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args={"mustdrop": False})
    expected = transformers_of.generate(ASKS[0], KEEP_ALL, NEW)[0]
    with engine(checkpoint, BUDGETS) as llm:
        cached = []
        for parameters in (plain, sampling(NEW), plain, sampling(NEW), plain):
            (output,) = llm.generate([ASKS[0].for_vllm()], parameters, use_tqdm=False)
            cached.append(output.num_cached_tokens)
            tokens = expected if parameters is plain else transformers_of.generate(ASKS[0], BUDGETS, NEW)[0]
            assert list(output.outputs[0].token_ids) == tokens
    assert cached == [0, 0, 128, 0, 128]
