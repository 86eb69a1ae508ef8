# SPDX-License-Identifier: Apache-2.0
"""Models in no table: LLaVA with other language models works, every other model is refused with a message."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import tiny_models
import transformers as tf
from masked_reference import MaskedReference
from test_families import BUDGETS, NEW_TOKENS, PLAIN, TOWER, assert_keep_all_changes_nothing, generate
from tiny_models import FAMILIES, TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens, families
from mustdrop_kernels.integrations.transformers.families import _FAMILIES, family_of, register_family

HEAD = {"head_dim": 12}
TEXT_CONFIGS = {
    "mistral": lambda: tf.MistralConfig(**TEXT, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**TEXT),
    "qwen3": lambda: tf.Qwen3Config(**TEXT, **HEAD),
    "gemma": lambda: tf.GemmaConfig(**TEXT, **HEAD),
    "olmo2": lambda: tf.Olmo2Config(**TEXT),
    "granite": lambda: tf.GraniteConfig(**TEXT),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, sliding_window=None, num_local_experts=2),
}
REFUSED = {
    "mistral": (lambda: tf.MistralConfig(**TEXT, sliding_window=16), "sliding_window=16"),
    "gemma2": (lambda: tf.Gemma2Config(**TEXT, **HEAD), "full attention in every language layer"),
    "gemma3": (lambda: tf.Gemma3TextConfig(**TEXT, **HEAD), "full attention in every language layer"),
}


CAPPED = [config for config, _ in REFUSED.values()]  # sdpa cannot cap scores


@functools.cache
def llava(text, tower=tiny_models.clip, layer=-2):
    def build():
        layers = list(layer) if isinstance(layer, tuple) else layer
        strategy = dict(vision_feature_layer=layers, vision_feature_select_strategy="default")
        return tiny_models.build("Llava", tower(6), text(), **strategy)

    tiny = tiny_models.Tiny(build, FAMILIES["llava"].picture, FAMILIES["llava"].collate)
    return tiny_models.model_of(tiny, attention={"text_config": "eager"} if text in CAPPED else "sdpa")


ROWS = [[3, ("picture", 0), 8], [4, ("picture", 1), 2, ("picture", 2), 5], [9]]


def inputs_for(model, extra=0):
    tiny = tiny_models.Tiny(lambda: model, tiny_models._llava_picture(extra), FAMILIES["llava"].collate)
    return tiny_models.batch(tiny, model.config, ROWS)


def check(model, inputs, config):
    assert_keep_all_changes_nothing(model, inputs)
    with drop_tokens(model, config) as report:
        output = generate(model, inputs)
    MaskedReference(model, config).check(output, inputs, NEW_TOKENS)
    assert report.last.final_cache.bytes < report.last.plain_cache.bytes


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_language_models(text):
    model = llava(TEXT_CONFIGS[text])
    check(model, inputs_for(model), MustDropConfig(**{**PLAIN, **BUDGETS, **TOWER}))


@pytest.mark.parametrize("text", REFUSED)
def test_language_models_that_are_refused(text):
    config, sentence = REFUSED[text]
    with pytest.raises(ValueError, match=sentence), drop_tokens(llava(config), MustDropConfig(**PLAIN, **BUDGETS)):
        pass


def test_features_of_several_layers():
    model = llava(TEXT_CONFIGS["qwen2"], layer=(-2, 2))
    check(model, inputs_for(model), MustDropConfig(**PLAIN, **BUDGETS))


def test_a_tower_without_cls_whose_first_patch_is_cut_off():
    """A SigLIP with vision_feature_select_strategy='default': stage 2 serves, the tower is left alone."""
    model = llava(TEXT_CONFIGS["qwen2"], tower=tiny_models.siglip)
    with pytest.raises(ValueError, match=r"key_rate=0\.0"), drop_tokens(model, MustDropConfig(**PLAIN, **BUDGETS)):
        pass
    check(model, inputs_for(model, extra=-1), MustDropConfig(**{**PLAIN, **BUDGETS, "key_rate": 0.0}))


DOCS = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.mark.skipif(not DOCS.exists(), reason="not in a source checkout")
@pytest.mark.skipif(tf.__version__ < "5", reason="the example reads the newest config")
def test_the_documented_example_serves_its_model(monkeypatch):
    """As a reader adds it from outside of the package."""
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "VipLlava" in block]
    space = {}
    exec(example, space)
    monkeypatch.setattr(families, "_FAMILIES", {})
    register_family("VipLlavaForConditionalGeneration", space["VipLlava"])
    model = tiny_models.model_of(FAMILIES["vipllava"])
    assert type(family_of(model)) is space["VipLlava"]
    inputs = tiny_models.batch(FAMILIES["vipllava"], model.config, ROWS)
    check(model, inputs, MustDropConfig(**{**PLAIN, **BUDGETS, **TOWER}))


def others():
    """Every model of transformers that reads images and text; in the quick matrix those that are asked for most."""
    often = {"Qwen3VL", "Qwen2VL", "Gemma3", "PaliGemma", "Idefics3", "SmolVLM", "Mllama", "Blip2", "Mistral3"}
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    flat = {name if isinstance(name, str) else name[0] for name in names} - set(_FAMILIES)
    for name in sorted(flat):
        quick = name.removesuffix("ForConditionalGeneration") in often
        yield pytest.param(name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [*others()])
def test_other_models_are_refused_at_the_door(name):
    """By their class, before anything of theirs is looked at; none passes for one that is served."""
    model = object.__new__(getattr(tf, name))
    with pytest.raises(TypeError, match=f"drop_tokens serves LlavaFor.*got {name}.*register_family"):
        family_of(model)
