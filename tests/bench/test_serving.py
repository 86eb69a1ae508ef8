# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench serving` without vLLM: its dry run and its refusal; tests/integrations/vllm_plugin runs it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest


def test_dry_run_says_what_the_arms_are(mustdrop):
    plan = {"merge": False, "budgets": [1], "pruning_layers": [0]}
    words = ["bench", "serving", "--dry-run", "--rounds", "2", "--concurrency", "1,4", "--model", "some"]
    *engines, rounds = mustdrop(*words).stdout.splitlines()
    arms = {name: json.loads(settings) for name, settings in (line.split(" ", 1) for line in engines)}
    assert list(arms) == ["full", "dropped"]
    assert arms["dropped"].pop("hf_overrides")["mustdrop"]
    assert arms["full"] == arms["dropped"], "they differ in dropping alone"
    assert rounds == "2 rounds of [1, 4] requests in flight: 48 requests"
    assert json.dumps(plan) in mustdrop(*words, "--plan", json.dumps(plan)).stdout


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_is_missing(mustdrop):
    result = mustdrop("bench", "serving")
    assert result.exit_code == 2
    assert "mustdrop: serving needs vLLM" in result.output


def test_a_plan_must_be_json(mustdrop):
    result = mustdrop("bench", "serving", "--dry-run", "--plan", "budget-128")
    assert result.exit_code == 2
    assert "--plan is not JSON" in result.output


def test_the_narrow_model_is_a_checkpoint_that_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    from mustdrop_kernels.bench import serving

    serving.write_narrow(tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=True)
    assert (model.config.text_config.num_hidden_layers, model.config.image_seq_length) == (12, 576)
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path)(
        images=serving.picture(0, 336), text=serving.PROMPT, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 576
