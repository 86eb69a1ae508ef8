# SPDX-License-Identifier: Apache-2.0
"""Settings of one request, beside the engine's."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from engines import ASKS, BUDGETS, KEEP_ALL, PLANS, engine, free_blocks, generate, scheduler
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from mustdrop_kernels.integrations.vllm import scheduler as rules
from mustdrop_kernels.integrations.vllm import settings

NEW = 12
FEWER = {"budgets": [30, 20, 10]}
OTHER_LAYERS = {"pruning_layers": [2], "budgets": [25]}
THRESHOLDS = {"budgets": None, "global_threshold": 0.01, "individual_threshold": 0.02}
GIVEN = {  # and the fields that it changes; None: every token is kept
    "nothing": (None, {}),
    "true": (True, {}),
    "false": (False, None),
    "false over HTTP": (0, None),
    "false as text": ("false", None),
    "fields": (FEWER, FEWER),
    "JSON": (json.dumps(OTHER_LAYERS), OTHER_LAYERS),
    "thresholds": (THRESHOLDS, THRESHOLDS),
    "last query": ({"text_queries": "last"}, {"text_queries": "last"}),
    "a preset and layers": (
        {"preset": "64", "pruning_layers": [1, 3, 5]},
        {"pruning_layers": [1, 3, 5], "budgets": None, "global_threshold": 0.011, "individual_threshold": 0.01},
    ),
}
WRONG = {
    "a number": (7, r"extra_args\['mustdrop'\] must be false, a preset's name or an object of fields, got 7"),
    "no preset": ("some", "no preset 'some'"),
    "no JSON": ('{"budgets": ', "must hold a preset's name or a JSON object"),
    "unknown": ({"layers": [1]}, "cannot set layers: a request sets a preset or pruning_layers, "),
    "no name": ({"preset": ["64"]}, r"no preset \['64'\]"),
    "names that are numbers": ({1: 2}, "cannot set 1: a request sets"),
    "too large": ({"budgets": [2**40] * 3}, "budgets must be a tuple of integers"),
    "beyond float32": ({"global_threshold": 1e300}, "global_threshold must be a number"),
    "stage 1": ({"merge": False, **FEWER}, "cannot set merge"),
    "rising": ({"budgets": [20, 40, 70]}, "budgets must be falling"),
    "too deep": ({"pruning_layers": [1, 3, 8]}, "has 8 layers, there is no 8"),
    "too few": ({"budgets": [20]}, "budgets must be one number per pruning layer"),
}


def parameters(value):
    return SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args={"mustdrop": value})


@pytest.mark.parametrize("name", ["budgets", "all stages"])
def test_requests_of_all_kinds_at_once(name, checkpoint, transformers_of):
    """Tokens equal transformers' with the engine's fields and those of the request; text has no use for any."""
    engines = PLANS[name]
    asked = [(ask, *GIVEN[kind]) for kind in GIVEN for ask in (ASKS[0], ASKS[3])] + [(ASKS[1], *GIVEN["fields"])]
    plans = [KEEP_ALL if fields is None else {**engines, **fields} for _, _, fields in asked]
    if name == "all stages":  # it has two pruning layers and thresholds
        keep = [len(plan.get("budgets") or plan["pruning_layers"]) == len(plan["pruning_layers"]) for plan in plans]
        asked, plans = ([x for x, kept in zip(xs, keep, strict=True) if kept] for xs in (asked, plans))
    expected = [transformers_of.generate(ask, plan, NEW)[0] for (ask, _, _), plan in zip(asked, plans, strict=True)]
    assert len(set(map(tuple, expected))) > 6
    with engine(checkpoint, engines) as llm:
        free = free_blocks(llm)
        prompts = [ask.for_vllm() for ask, _, _ in asked]
        outputs = llm.generate(prompts, [parameters(value) for _, value, _ in asked], use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        assert free_blocks(llm) == free
        assert scheduler(llm).plain_prompts == 0  # they keep their tokens by choice


def test_wrong_values_end_their_request(checkpoint, transformers_of):
    with engine(checkpoint, BUDGETS) as llm:
        for value, sentence in WRONG.values():
            with pytest.raises(VLLMValidationError, match=sentence):
                llm.generate([ASKS[0].for_vllm()], parameters(value), use_tqdm=False)
        assert generate(llm, ASKS, NEW) == [transformers_of.generate(ask, BUDGETS, NEW)[0] for ask in ASKS]


def test_front_ends_without_the_plugin(checkpoint, transformers_of, monkeypatch):
    """They check nothing: a wrong value costs the drop, and not the engine."""
    said = []
    monkeypatch.setattr(settings, "check_request", lambda *args: None)
    monkeypatch.setattr(rules.logger, "warning", lambda text, *values: said.append(text % values))
    expected = transformers_of.generate(ASKS[0], KEEP_ALL, NEW)[0]
    with engine(checkpoint, BUDGETS) as llm:
        for value in ({"pruning_layers": [1, 3, 8]}, 7):
            (output,) = llm.generate([ASKS[0].for_vllm()], parameters(value), use_tqdm=False)
            assert list(output.outputs[0].token_ids) == expected
        assert generate(llm, ASKS[:1], NEW) == [transformers_of.generate(ASKS[0], BUDGETS, NEW)[0]]
    assert "there is no 8; the request" in said[0]
    assert "got 7; the request" in said[1]


def test_plain_engines_leave_them_alone(checkpoint):
    with engine(checkpoint, None) as llm:
        (output,) = llm.generate([ASKS[0].for_vllm()], parameters(7), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == NEW
