# SPDX-License-Identifier: Apache-2.0
"""Unsupported settings are refused at start, with a message that names the setting."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import gpu_backends
import torch
from engines import BUDGETS, arguments
from servers import switched_on

from mustdrop_kernels.bench.vllm_engine import ARCHITECTURE
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations import vllm as plugin
from mustdrop_kernels.integrations.vllm.engine import SCHEDULER
from mustdrop_kernels.integrations.vllm.plugin import ARCHITECTURES
from mustdrop_kernels.integrations.vllm.vision import VisionStage

SETTINGS = {
    "pipeline": (dict(pipeline_parallel_size=2, distributed_executor_backend="mp"), "pipeline_parallel_size must be 1"),
    "drafts of a model": (
        dict(speculative_config={"method": "draft_model", "num_speculative_tokens": 2}),
        "speculative_config must use one of ngram, ngram_gpu: ",
    ),
    "KV transfer": (
        dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
        "kv_transfer_config cannot be used",
    ),
    "KV offloading": (dict(kv_offloading_size=0.01), "kv_offloading_size cannot be used"),
    "an engine that encodes": (
        dict(ec_transfer_config={"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}),
        "ec_transfer_config cannot be used",
    ),
    "encoder only": (dict(mm_encoder_only=True), "mm_encoder_only cannot be used"),
    "encoder cache": (
        dict(ec_manager_config={"encoder_cache_manager_cls": "vllm.v1.core.encoder_cache_manager.EncoderCacheManager"}),
        "ec_manager_config cannot be used",
    ),
    "pooling": (dict(runner="pooling"), "runner must be 'generate', got 'pooling'"),
    "classification": (dict(runner="pooling", convert="classify"), "runner must be 'generate', got 'pooling'"),
    "embedding": (dict(convert="embed"), "runner must be 'generate', got 'pooling'"),
    "token embedding": (
        dict(runner="pooling", pooler_config={"task": "token_embed"}),
        "runner must be 'generate', got 'pooling'",
    ),
    "adapters of the tower": (
        dict(enable_lora=True, enable_tower_connector_lora=True),
        "enable_tower_connector_lora cannot be used",
    ),
    "another class": (
        dict(model_class_overrides={ARCHITECTURE: "vllm.model_executor.models.llava:LlavaForConditionalGeneration"}),
        f"model_class_overrides must leave out {ARCHITECTURE}",
    ),
    "scheduler": (dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "scheduler_cls must be left out"),
    "worker": (dict(worker_cls="vllm.v1.worker.gpu_worker.Worker"), "worker_cls must be left out"),
}
V1 = gpu_backends.DEFAULT.startswith("1")
BY_VLLM = {  # what a model runner refuses for this model
    "experts": (dict(enable_expert_parallel=True), "Number of experts in the model must be greater than 0"),
    "sleep": (dict(enable_sleep_mode=True), "Sleep mode is not supported on current platform"),
    "transformers' model": (dict(model_impl="transformers"), "is not a registered model"),
    "microbatches": (
        dict(ubatch_size=2),
        "Microbatching currently only supports" if V1 else "does not yet support: dual batch overlap with multimodal",
    ),
    "routed experts": (
        dict(enable_return_routed_experts=True),
        "requires Model Runner V2" if V1 else "AuxOutput Connector only supports MoE models",
    ),
}
if V1:
    BY_VLLM |= {  # what V2 serves (test_sampling.py), or is without effect
        "sampling masks": (dict(return_sampling_mask=True), "requires Model Runner V2"),
        "trace replay": (dict(enable_trace_replay=True), "requires Model Runner V2"),
        "sharded sampling": (dict(enable_batch_sharded_sampling=True), "Model Runner V1 does not support"),
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


@pytest.fixture(autouse=True)
def models():
    """The models of vLLM's registry, which model_class_overrides changes for good."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH

    plugin.register()
    before = dict(ModelRegistry.models)
    yield
    _MODEL_ARCH_BY_HASH.clear()
    ModelRegistry.models.clear()
    ModelRegistry.models.update(before)


def configure(checkpoint, plan, **settings):
    from vllm.engine.arg_utils import EngineArgs

    with gpu_backends.default_platform():
        return EngineArgs(**arguments(checkpoint, plan, **settings)).create_engine_config()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, checkpoint):
    settings, sentence = SETTINGS[name]
    if "speculative_config" in settings:
        settings = {"speculative_config": {**settings["speculative_config"], "model": str(checkpoint)}}
    with pytest.raises(ValueError, match=f"mustdrop: {sentence}"):
        configure(checkpoint, BUDGETS, **settings)


def test_breakable_graphs(checkpoint, monkeypatch):
    """They would replay steps in which tokens are dropped."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="mustdrop: VLLM_USE_BREAKABLE_CUDAGRAPH must be 0"):
        configure(checkpoint, BUDGETS)


@pytest.mark.parametrize("name", BY_VLLM)
def test_settings_that_vllm_itself_refuses(name, checkpoint):
    """For this model, on a CPU; a vLLM that takes them needs a check of the plug-in."""
    settings, sentence = BY_VLLM[name]
    with pytest.raises(ValueError, match=sentence):
        configure(checkpoint, BUDGETS, **settings)


def test_models_of_transformers_are_left_alone(checkpoint):
    """The variable enables vLLM's LLaVA models only."""
    with switched_on("budget-64"):
        assert configure(checkpoint, None, model_impl="transformers").scheduler_config.scheduler_cls is None


def test_overrides_may_be_a_function(checkpoint):
    def override(config):
        config.update({"architectures": [ARCHITECTURE], "mustdrop": BUDGETS})
        return config

    assert configure(checkpoint, None, hf_overrides=override).scheduler_config.scheduler_cls == SCHEDULER


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
    assert ours.scheduler_config.async_scheduling is not V1
    assert ours.scheduler_config.scheduler_cls == SCHEDULER
    assert ours.parallel_config.worker_cls.endswith("MustDropWorker") is V1


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
        assert config.scheduler_config.scheduler_cls == SCHEDULER
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
