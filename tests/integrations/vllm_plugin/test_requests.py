# SPDX-License-Identifier: Apache-2.0
"""Parameters of requests, one line each, and what is done to an engine while requests run."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
from engines import ASKS, BUDGETS, KEEP_ALL, drop_record, engine, free_blocks, generate, sampling
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

NEW = 8
PARAMETERS = [
    dict(logprobs=3),
    dict(logprobs=3, flat_logprobs=True),
    dict(temperature=1.0, seed=3),
    dict(temperature=1.0, seed=4, n=3),
    dict(temperature=0.7, top_p=0.8, top_k=20, min_p=0.01, seed=5),
    dict(presence_penalty=1.0, frequency_penalty=0.5),
    dict(repetition_penalty=1.3),  # it counts the tokens of the prompt
    dict(ignore_eos=False, min_tokens=NEW),
    dict(stop=["a", "e"], include_stop_str_in_output=True),
    dict(stop_token_ids=[398, 139], min_tokens=2),
    dict(bad_words=["car", "street"]),
    dict(logit_bias={5: 3.0, 398: -10.0}),
    dict(allowed_token_ids=[10, 20, 30, 398, 139]),
    dict(detokenize=False),
    dict(skip_special_tokens=False, spaces_between_special_tokens=False),
    dict(skip_reading_prefix_cache=False),
    dict(extra_args={"bias": 7}),  # of the logits processor below
    dict(structured_outputs=StructuredOutputsParams(choice=["a car", "the street"])),
    dict(structured_outputs=StructuredOutputsParams(regex="[a-c]{3}")),
]
SETTINGS = {"logits_processors": [f"logits_processor:BiasV{gpu_backends.DEFAULT[0]}"], "max_num_seqs": 16}


def answers(llm, parameters, asks, priority=0):
    """Tokens, text and log probabilities of each request."""
    base = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
    chosen = SamplingParams(**{**base, **parameters})
    prompts = [{**ask.for_vllm(), "cache_salt": f"salt {parameters}"} for ask in asks]
    outputs = llm.generate(prompts, chosen, use_tqdm=False, priority=[priority] * len(prompts))
    return [[(list(o.token_ids), o.text, probabilities(o)) for o in output.outputs] for output in outputs]


def probabilities(output):
    if output.logprobs is None:
        return None
    return [{token: pytest.approx(p.logprob, abs=1e-3) for token, p in place.items()} for place in output.logprobs]


@pytest.fixture(scope="module")
def plain(checkpoint):
    with engine(checkpoint, None, **SETTINGS) as llm:
        return [answers(llm, parameters, ASKS) for parameters in PARAMETERS]


def test_parameters_do_what_they_do_in_plain_vllm(checkpoint, plain):
    with engine(checkpoint, KEEP_ALL, **SETTINGS) as llm:
        for parameters, expected in zip(PARAMETERS, plain, strict=True):
            assert answers(llm, parameters, ASKS) == expected, parameters
    assert len({str(tokens) for tokens in plain}) > len(PARAMETERS) // 2


def test_parameters_do_not_depend_on_the_batch(checkpoint, plain):
    """With dropped tokens; text is answered as in plain vLLM."""
    with engine(checkpoint, BUDGETS, **SETTINGS, scheduling_policy="priority") as llm:
        for parameters, expected in zip(PARAMETERS, plain, strict=True):
            together = answers(llm, parameters, ASKS)
            apart = [answers(llm, parameters, asks, priority=1) for asks in (ASKS[:2], ASKS[2:])]
            assert [answer for part in apart for answer in part] == together, parameters
            assert together[1] == expected[1], parameters


def run(llm, actions):
    """Tokens of all requests, with an action before some of the steps."""
    core = llm.llm_engine
    for i, ask in enumerate(ASKS):
        core.add_request(f"request-{i}", ask.for_vllm(), sampling(NEW))
    done, step = {}, 0
    while core.has_unfinished_requests():
        actions.get(step, lambda: None)()
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
        step += 1
    return [done[name] for name in sorted(done)]


def test_actions_leave_the_tokens_alone(checkpoint, transformers_of):
    expected = [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in ASKS]
    with engine(checkpoint, BUDGETS, worker_extension_cls="worker_extension.Extension") as llm:
        core, free = llm.llm_engine.engine_core.engine_core, free_blocks(llm)

        def pause_and_resume():
            llm.llm_engine.renderer.clear_mm_cache()
            core.pause_scheduler(mode="keep", clear_cache=True)
            core.resume_scheduler()

        dropping = []
        actions = {
            "preempt all": lambda: core.reset_prefix_cache(reset_running_requests=True),
            "pause": pause_and_resume,
            "call all workers": lambda: dropping.append(llm.collective_rpc("dropped_requests")),
            "sleep": lambda: llm.collective_rpc("sleep", kwargs={"level": 1}),
            "apply a function": lambda: llm.apply_model(lambda model: None),
        }
        for name, action in actions.items():
            assert run(llm, {3: action, 5: action}) == expected, name
        assert dropping == [[4], [4]]
        llm.reset_mm_cache()
        core.reset_encoder_cache()
        llm.collective_rpc("reload_weights")
        assert run(llm, {}) == expected
        assert generate(llm, ASKS[1:2], 1)  # after this step the worker knows of all ended requests
        assert free_blocks(llm) == free
        assert drop_record(llm).dropped == {}
