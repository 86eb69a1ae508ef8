# SPDX-License-Identifier: Apache-2.0
"""Modes of generation, and models loaded in different ways."""

from __future__ import annotations

import copy

import pytest
import tiny_llava
import tiny_models
import torch
from masked_reference import MaskedReference
from test_families import (
    BUDGETS,
    NEW_TOKENS,
    ONE,
    PLAIN,
    THRESHOLDS,
    TOWER,
    assert_same_bits,
    cache_of,
    generate,
    inputs_of,
    model_of,
)
from torch import nn
from transformers import TextStreamer

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

CONFIGS = {"thresholds": MustDropConfig(**PLAIN, **THRESHOLDS), "budgets": MustDropConfig(**PLAIN, **BUDGETS)}
NAMES = ("llava", "llava_next", "qwen2_5_vl")


def dropped(model, inputs, config=CONFIGS["budgets"], **settings):
    with drop_tokens(model, config) as report:
        output = generate(model, inputs, **settings)
    return output, report


@pytest.mark.parametrize("name", ["llava_next_video", "video_llava", "qwen2_5_vl"])
def test_beams_equal_masked_reference(name):
    """Images and videos of every row, repeated for its beams."""
    model = model_of(name)
    inputs = inputs_of(name, [[3, ("picture", 0), 8], [9], [2, ("picture", 100), 6]])
    output, _ = dropped(model, inputs, num_beams=2)
    tokens, _ = MaskedReference(model, CONFIGS["budgets"]).generate(inputs, NEW_TOKENS, num_beams=2)
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], tokens)


@pytest.mark.skipif(tiny_models.tf.__version__ < "5", reason="generate() of transformers 4 ignores such images")
@pytest.mark.parametrize("kind", ["thresholds", "no eviction", "merging", "keep all"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_more_images_in_a_later_turn(name, kind):
    """Each turn brings its own pixels; text of the second decides about the second's images alone."""
    model = model_of(name)
    config = {
        "thresholds": CONFIGS["thresholds"],
        "no eviction": MustDropConfig(**PLAIN, **BUDGETS, evict=False),
        "merging": MustDropConfig(**{**PLAIN, **BUDGETS, **TOWER}),
        "keep all": MustDropConfig.preset("keep-all", pruning_layers=(1, 3)),
    }[kind]
    rows = [[3, ("picture", 0), 8], [9]], [[2, ("picture", 1), 5], [6, ("picture", 2), 7]]
    first, second = (inputs_of(name, row) for row in rows)
    reference = MaskedReference(model, config)
    with drop_tokens(model, config) as report:
        output = opening = generate(model, first)
        cache = cache_of(output)
        generated = torch.ones(2, NEW_TOKENS, dtype=torch.long)
        turn = {
            **second,
            "input_ids": torch.cat([output.sequences, second["input_ids"]], 1),
            "attention_mask": torch.cat([first["attention_mask"], generated, second["attention_mask"]], 1),
        }
        output = generate(model, {**turn, "past_key_values": cache})
    reference.generate(first, NEW_TOKENS)
    assert torch.equal(opening.sequences, reference.sequences)
    reference.check(output, turn, NEW_TOKENS)
    assert [len(prompt.images) for prompt in report.prompts] == [1, 2]
    lengths = [layer.keys.shape[2] - NEW_TOKENS + 1 for layer in cache.layers]
    assert lengths == report.last.final_cache.lengths
    if kind != "keep all":
        assert sum(lengths) < sum(report.last.plain_cache.lengths)


# Assisted decoding: candidate tokens are no text queries, and rejected ones are removed.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("assistant", ["prompt lookup", "itself", "another"])
def test_assisted_generation_gives_the_same_tokens(assistant, name, config):
    if name == "qwen2_5_vl" and tiny_models.tf.__version__ < "5":
        pytest.skip("plain assisted generation of Qwen2.5-VL fails in transformers 4")
    model = model_of(name)
    inputs = inputs_of(name, [[3, ("picture", 1), 12]])
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, -10:-8]  # so that a lookup finds something, wrong as it is
    never = {"eos_token_id": tiny_models.VOCABULARY + 1}  # transformers 4 requires one
    expected, first = dropped(model, inputs, config, max_new_tokens=12, **never)
    if assistant == "prompt lookup":
        settings = {"prompt_lookup_num_tokens": 3}
    else:
        helper = copy.deepcopy(model)
        if assistant == "another":
            nn.init.normal_(helper.lm_head.weight)
        settings = {"assistant_model": helper}
    output, report = dropped(model, inputs, config, max_new_tokens=12, **never, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert report.last.images[0].kept == first.last.images[0].kept
    cache = cache_of(output)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    for one, other in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_streaming(capsys):
    model, inputs, tokenizer = model_of("llava"), inputs_of("llava", ONE), tiny_llava.tokenizer()
    with drop_tokens(model, CONFIGS["budgets"]):
        sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(sequences[0]) + "\n"


# Ways to load a model


def test_layers_placed_by_accelerate():
    """device_map wraps every module's forward; weights that wait on the host come when their layer runs."""
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava")
    expected, _ = dropped(model, inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    output, _ = dropped(model, inputs)
    assert torch.equal(output.sequences, expected.sequences)


def test_gradient_checkpointing_is_refused():
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava", ONE)
    model.train()
    model.gradient_checkpointing_enable()
    with drop_tokens(model, CONFIGS["budgets"]), pytest.raises(ValueError, match="gradient checkpointing"):
        model(**inputs, use_cache=False)
    model.eval()
    with drop_tokens(model, CONFIGS["budgets"]):
        model(**inputs, use_cache=False)


@pytest.mark.slow
def test_compiled_forward_gives_the_same_tokens():
    """torch.compile breaks its graph at our hooks, and what it compiles stays right."""
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava", ONE)
    expected, _ = dropped(model, inputs)
    for layer in model.model.language_model.layers:
        layer.mlp = torch.compile(layer.mlp, dynamic=True)
    output, _ = dropped(model, inputs)
    assert torch.equal(output.sequences, expected.sequences)


# Without drop_tokens nothing changes.


def test_text_alone_gives_the_same_bits():
    model, inputs = model_of("llava_next"), inputs_of("llava_next", [[9], [4]])
    plain = generate(model, inputs)
    layers = model.model.language_model.layers
    with drop_tokens(model, CONFIGS["budgets"]) as report:
        generate(model, inputs_of("llava_next", ONE))
        assert not any(layer._forward_pre_hooks for layer in layers)  # so it runs at plain speed
        output = generate(model, inputs)
        report.prompts.clear()
        generate(model, inputs)
    assert_same_bits(output, plain)
    assert report.prompts == []
