# SPDX-License-Identifier: Apache-2.0
"""drop_tokens gives plain results if nothing is dropped, and restores the model."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from attached import everything_attached
from torch import nn
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

KEEP_ALL = MustDropConfig.preset("keep-all", pruning_layers=(0, 2, 5, 7))
DROP = MustDropConfig(pruning_layers=(1, 3), budgets=(60, 30))


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, **settings}
    return model.generate(**inputs, return_dict_in_generate=True, **settings)


def assert_same(ours, plain):
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))


def test_keep_all_equals_plain_generate_bit_for_bit(model, inputs):
    plain = generate(model, inputs)
    with drop_tokens(model, KEEP_ALL) as report:
        assert_same(generate(model, inputs), plain)
    lengths = report.last.final_cache.lengths
    assert lengths == report.last.plain_cache.lengths == [inputs["input_ids"].shape[1]] * 8


@pytest.mark.parametrize("positions", ["original", "published"])
def test_key_tokens_alone_change_nothing(positions, model, padded):
    """Stage 1 looks at the tower without merging: still the plain result."""
    config = MustDropConfig.preset("keep-all", key_rate=0.2, pruning_layers=(1,), positions=positions)
    plain = generate(model, padded)
    with drop_tokens(model, config):
        assert_same(generate(model, padded), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"output_hidden_states": True},
    ],
    ids=["sampling", "beams", "beam sampling", "hidden states"],
)
def test_keep_all_equals_plain_in_other_modes(settings, sdpa, padded):
    torch.manual_seed(1)
    plain = generate(sdpa, padded, **settings)
    torch.manual_seed(1)
    with drop_tokens(sdpa, KEEP_ALL):
        assert_same(generate(sdpa, padded, **settings), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, sdpa, padded):
    model = copy.deepcopy(sdpa).to(dtype)
    plain = generate(model, padded)
    with drop_tokens(model, KEEP_ALL):
        assert_same(generate(model, padded), plain)
    with drop_tokens(model, DROP) as report:
        output = generate(model, padded)
    assert torch.stack(output.logits).isfinite().all()
    assert [image.kept for image in report.last.images] == [{1: 60, 3: 30}] * 2
    assert output.past_key_values.layers[7].keys.dtype == dtype


def test_text_without_image_runs_plain(model, processor):
    inputs = processor(text=["USER: car? ASSISTANT:", "ASSISTANT:"], return_tensors="pt", padding=True)
    plain, direct = generate(model, inputs), model(**inputs).logits
    with drop_tokens(model, DROP) as report:
        assert_same(generate(model, inputs), plain)
        assert torch.equal(model(**inputs).logits, direct)
    assert report.prompts == []


def test_outputs_begin_with_the_given_ids_and_decode(sdpa, processor, one):
    with drop_tokens(sdpa, DROP):
        ids = sdpa.generate(**one, max_new_tokens=5, do_sample=False)
    prompt = one["input_ids"]
    assert torch.equal(ids[:, : prompt.shape[1]], prompt)
    assert ids.shape[1] == prompt.shape[1] + 5
    (text,) = processor.batch_decode(ids, skip_special_tokens=True)
    assert text.startswith("USER: \nWhat is in the image? ASSISTANT:")


def test_streams_the_plain_prompt_and_new_tokens(sdpa, one):
    class Streamer:
        def __init__(self):
            self.parts = []

        def put(self, ids):
            self.parts.append(ids.flatten())

        def end(self):
            pass

    streamer = Streamer()
    with drop_tokens(sdpa, DROP):
        ids = sdpa.generate(**one, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat(streamer.parts), ids[0])


# One forward pass without generate.


def test_direct_call_returns_logits_of_what_is_left(model, inputs):
    with drop_tokens(model, DROP) as report:
        first = generate(model, inputs).logits[0]
        output = model(**inputs)  # gradients on: a plain call as people write it
        without_cache = model(**inputs, use_cache=False)
    assert output.logits.requires_grad
    torch.testing.assert_close(output.logits[:, -1], first, atol=1e-4, rtol=0)
    assert torch.equal(without_cache.logits, output.logits)
    assert without_cache.past_key_values is None
    longest = max(report.last.final_cache.lengths[4:])
    assert output.logits.shape[1] == longest
    assert report.prompts[-1].final_cache.bytes == 0


def test_direct_call_with_right_padding(sdpa, processor, padded):
    """The last logits are the last real token's, whichever side the padding was on."""
    mask = padded["attention_mask"].bool()
    right = {key: torch.zeros_like(padded[key]) for key in ("input_ids", "attention_mask")}
    for row, real in enumerate(mask):
        for key, value in right.items():
            value[row, : int(real.sum())] = padded[key][row, real]
    right["input_ids"][right["attention_mask"] == 0] = processor.tokenizer.pad_token_id
    with drop_tokens(sdpa, DROP), torch.no_grad():
        left = generate(sdpa, padded).logits[0]
        logits = sdpa(**right, pixel_values=padded["pixel_values"]).logits[:, -1]
    torch.testing.assert_close(logits, left, atol=1e-4, rtol=0)


def test_gradients_reach_the_kept_tokens(sdpa, one):
    pixels = one["pixel_values"].clone().requires_grad_()
    with drop_tokens(sdpa, DROP):
        sdpa(**{**one, "pixel_values": pixels}, use_cache=False).logits[:, -1].sum().backward()
    assert pixels.grad.abs().sum() > 0
    sdpa.zero_grad(set_to_none=True)


# The model is left as it was.


def test_model_is_left_as_it_was(model, padded):
    generate(model, padded, output_hidden_states=True)  # transformers adds hooks of its own when first used
    before = everything_attached(model)
    with drop_tokens(model, DROP):
        assert everything_attached(model) != before
        generate(model, padded)
    assert everything_attached(model) == before


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["vision", "language", "caller", "enter"])
def test_model_is_left_as_it_was_after_an_exception(where, sdpa, padded, monkeypatch):
    plain = generate(sdpa, padded, output_hidden_states=True)
    before = everything_attached(sdpa)

    def fail(*args, **kwargs):
        raise Broken

    module = {"vision": sdpa.model.vision_tower, "language": sdpa.model.language_model.layers[3].mlp}.get(where)
    handle = module.register_forward_hook(fail) if module is not None else None
    if where == "enter":
        monkeypatch.setattr("mustdrop_kernels.integrations.transformers.layers.hooked_config", fail)
    with pytest.raises(Broken), drop_tokens(sdpa, DROP):
        fail() if where == "caller" else generate(sdpa, padded)
    if handle is not None:
        handle.remove()
    assert everything_attached(sdpa) == before
    assert_same(generate(sdpa, padded, output_hidden_states=True), plain)
    monkeypatch.undo()
    with drop_tokens(sdpa, DROP):  # and can be used again
        generate(sdpa, padded)


def test_a_patched_generate_is_put_back(sdpa, one):
    own = sdpa.generate
    sdpa.generate = lambda *args, **kwargs: own(*args, **kwargs)
    patched = sdpa.generate
    try:
        with drop_tokens(sdpa, DROP):
            assert sdpa.generate is not patched
        assert sdpa.generate is patched
    finally:
        del sdpa.generate


def test_an_attention_of_ones_own_is_called(sdpa, one):
    names = []

    def own(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        assert "mustdrop" not in kwargs
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("own", own)
    AttentionMaskInterface.register("own", sdpa_mask)
    with drop_tokens(sdpa, DROP):
        expected = generate(sdpa, one)
    sdpa.set_attn_implementation({"text_config": "own"})
    try:
        with drop_tokens(sdpa, DROP):
            assert_same(generate(sdpa, one), expected)
        assert sdpa.model.language_model.config._attn_implementation == "own"
    finally:
        sdpa.set_attn_implementation({"text_config": "sdpa"})
    assert set(names) == {"own"}
    assert len(names) == 8 * 6


# Unsupported uses raise an error with the reason.


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prefill_chunk_size": 64}, "in one piece"),
        ({"cache_implementation": "offloaded"}, "'dynamic'.*or 'static'"),
        ({"cache_implementation": "offloaded_static"}, "'dynamic'.*or 'static'"),
    ],
)
def test_refused_ways_of_generating(settings, sentence, sdpa, one):
    with drop_tokens(sdpa, DROP):
        with pytest.raises(ValueError, match=sentence):
            generate(sdpa, one, **settings)
        changed = copy.deepcopy(sdpa.generation_config)
        for name, value in settings.items():
            setattr(changed, name, value)
        with pytest.raises(ValueError, match=sentence):
            sdpa.generate(**one, generation_config=changed)


def test_refused_inputs(sdpa, one):
    with drop_tokens(sdpa, DROP), torch.no_grad():
        for call in (functools.partial(generate, sdpa, one), functools.partial(sdpa, **one)):
            with pytest.raises(ValueError, match="pass one that stays on the device"):
                call(past_key_values=DynamicCache(offloading=True))
            with pytest.raises(
                TypeError, match=r"is a EncoderDecoderCache.*pass a DynamicCache, a StaticCache, or none"
            ):
                call(past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            sdpa(**{**one, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)})
        with pytest.raises(ValueError, match="shape of input_ids"):
            sdpa(**{**one, "attention_mask": torch.ones(1, 3)})


def test_refused_models_and_configs(sdpa):
    with (
        pytest.raises(TypeError, match=r"LlavaForConditionalGeneration, .*InternVL.*; got Linear"),
        drop_tokens(nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="merge_layer 3 must come before"),
        drop_tokens(sdpa, MustDropConfig(merge_layer=3, pruning_layers=())),
    ):
        pass
    with drop_tokens(sdpa, DROP), pytest.raises(RuntimeError, match="already"), drop_tokens(sdpa, DROP):
        pass
    with drop_tokens(sdpa, DROP):  # the failed attempt has not switched it off, nor blocked the next
        pass


def test_an_unknown_tower_serves_stage_2_only(sdpa, one, monkeypatch):
    monkeypatch.setattr(sdpa.model.vision_tower.config, "model_type", "other")
    config = MustDropConfig(merge=False, key_rate=0.0, pruning_layers=(1,), budgets=(20,))
    with pytest.raises(ValueError, match="neither CLIP nor SigLIP"), drop_tokens(sdpa, DROP):
        pass
    with pytest.raises(ValueError, match=r"key_rate=0\.0 leaves the tower alone"):
        drop_tokens(sdpa, dataclasses.replace(config, key_rate=0.1)).__enter__()
    with drop_tokens(sdpa, config) as report:
        generate(sdpa, one)
    assert report.last.images[0].kept == {1: 20}
    assert report.last.images[0].grid == (1, 144)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("layer_types", ["full_attention"] * 7 + ["sliding_attention"], "full attention in every language layer"),
        ("sliding_window", 16, "sliding_window=16"),
        ("attn_logit_softcapping", 50.0, r"attn_logit_softcapping=50\.0"),
    ],
)
def test_language_models_that_are_refused(setting, value, sentence, sdpa, monkeypatch):
    monkeypatch.setattr(sdpa.model.language_model.config, setting, value, raising=False)
    with pytest.raises(ValueError, match=sentence), drop_tokens(sdpa, DROP):
        pass
