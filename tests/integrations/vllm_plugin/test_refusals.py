# SPDX-License-Identifier: Apache-2.0
"""Unsupported settings are refused at start, with a message that names the setting."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import torch
from engines import BUDGETS, arguments
from servers import switched_on

from mustdrop_kernels.bench.vllm_engine import ARCHITECTURE
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations import vllm as plugin
from mustdrop_kernels.integrations.vllm.plugin import ARCHITECTURES
from mustdrop_kernels.integrations.vllm.vision import VisionStage

SETTINGS = {
    "max_num_batched_tokens": (
        dict(max_num_batched_tokens=256),
        "max_num_batched_tokens .256. must be at least max_model",
    ),
    "max_num_scheduled_tokens": (
        dict(max_num_scheduled_tokens=256),
        "max_num_scheduled_tokens .256. must be at least max_model",
    ),
    "long prompts": (dict(long_prefill_token_threshold=64), "long_prefill_token_threshold must be 0"),
    "pipeline": (dict(pipeline_parallel_size=2, distributed_executor_backend="mp"), "pipeline_parallel_size must be 1"),
    "drafts": (
        dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}),
        "speculative decoding cannot be used",
    ),
    "cache type": (dict(kv_cache_dtype="fp8"), "kv_cache_dtype must be 'auto'"),
    "scheduler": (dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "scheduler_cls must be left out"),
    "worker": (dict(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"), "worker_cls must be left out"),
}
FIELDS = {
    "nothing": (None, "must hold"),
    "unknown": ({**BUDGETS, "layers": [1]}, "unknown field.s. layers"),
    "invalid": ({**BUDGETS, "budgets": [20, 40, 70]}, "budgets must be falling"),
    "too deep": ({**BUDGETS, "pruning_layers": [1, 3, 8]}, "has 8 layers, there is no 8"),
    "uniform merge": ({**BUDGETS, "merge": True, "merge_uniform": True}, "merge_uniform must be False"),
    "no eviction": ({**BUDGETS, "evict": False}, "evict must be True"),
    "late eviction": ({**BUDGETS, "evict_from": 2}, "evict_from must be 0"),
    "positions": ({**BUDGETS, "positions": "published"}, "positions must be 'original'"),
    "preset": ({"preset": "nothing"}, "no preset 'nothing'"),
}


def configure(checkpoint, plan, **settings):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments(checkpoint, plan, **settings)).create_engine_config()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, checkpoint):
    settings, sentence = SETTINGS[name]
    with pytest.raises(ValueError, match=f"mustdrop: {sentence}"):
        configure(checkpoint, BUDGETS, **settings)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name, checkpoint):
    fields, sentence = FIELDS[name]
    overrides = {"architectures": [ARCHITECTURE], **({} if fields is None else {"mustdrop": fields})}
    with pytest.raises(ValueError, match=sentence):
        configure(checkpoint, None, hf_overrides=overrides)


def test_presets_are_read(checkpoint):
    plan = {"preset": "budget-64", "merge": False, "key_rate": 0.0, "pruning_layers": [1, 3, 5, 7]}
    configure(checkpoint, plan)


def test_engine_is_set_up(checkpoint):
    """A plain model is left alone."""
    plain = configure(checkpoint, None)
    ours = configure(checkpoint, BUDGETS)
    assert plain.scheduler_config.scheduler_cls is None
    assert not ours.scheduler_config.async_scheduling
    assert ours.scheduler_config.scheduler_cls.endswith("MustDropScheduler")
    assert ours.parallel_config.worker_cls.endswith("MustDropCPUWorker")


@pytest.mark.parametrize(("text", "fields"), [(json.dumps(BUDGETS), BUDGETS), ("64", {"preset": "64"})])
def test_the_variable_switches_on(text, fields, checkpoint, monkeypatch):
    """Without it the same model is left alone."""
    with switched_on(text):
        if "preset" in fields:
            with pytest.raises(ValueError, match="the language model has 8 layers, there is no 10"):
                configure(checkpoint, None)
            return
        config = configure(checkpoint, None)
        assert config.model_config.hf_config.mustdrop == fields
        assert config.scheduler_config.scheduler_cls.endswith("MustDropScheduler")
        given = configure(checkpoint, {**BUDGETS, "budgets": [3, 2, 1]})
        assert given.model_config.hf_config.mustdrop["budgets"] == [3, 2, 1]
    assert configure(checkpoint, None).scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [('{"budgets": ', "MUSTDROP_VLLM must hold a preset's name or a JSON object"), ("some", "no preset 'some'")],
)
def test_what_the_variable_holds_is_checked(text, sentence, checkpoint):
    with switched_on(text), pytest.raises(ValueError, match=sentence):
        configure(checkpoint, None)


def test_merge_layer_that_the_tower_does_not_run():
    layers = [torch.nn.Identity() for _ in range(3)]
    with pytest.raises(ValueError, match="merge_layer 3: the vision tower runs 3 layers"):
        VisionStage(layers, (12, 12), MustDropConfig(merge_layer=3, merge_budget=7))


def test_registering_twice_changes_nothing():
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    plugin.register()
    before = [(ModelRegistry.models[name], MODELS_CONFIG_MAP[name]) for name in ARCHITECTURES]
    plugin.register()
    assert [(ModelRegistry.models[name], MODELS_CONFIG_MAP[name]) for name in ARCHITECTURES] == before
