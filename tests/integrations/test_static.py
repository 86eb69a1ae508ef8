# SPDX-License-Identifier: Apache-2.0
"""Static caches: buffers keep their addresses, and tokens equal those of a dynamic cache."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from test_families import (
    BUDGETS,
    FEATURES,
    NEW_TOKENS,
    ONE,
    PLAIN,
    TOWER,
    assert_keep_all_changes_nothing,
    cache_of,
    generate,
    inputs_of,
    model_of,
)
from transformers import StaticCache

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import DropStaticCache, drop_tokens

HIGHER = dict(global_threshold=0.05, individual_threshold=0.1)
CONFIGS = {
    "thresholds": {**PLAIN, **HIGHER},
    "budgets": {**PLAIN, **BUDGETS},
    "no eviction": {**PLAIN, **HIGHER, "evict": False},
    "eviction everywhere": {**PLAIN, **BUDGETS, "evict_from": 0},
    "features": {**PLAIN, **BUDGETS, **FEATURES},
}
STATIC = {"cache_implementation": "static"}
PADDED = None
NAMES = sorted({name.split()[0] for name in tiny_models.FAMILIES})


def both(model, inputs, config, **settings):
    """The same prompt with a cache that grows, and with a static one."""
    with drop_tokens(model, config) as report:
        grown = generate(model, inputs, **settings)
        static = generate(model, inputs, **STATIC, **settings)
    return grown, static, report


def assert_same_tokens(static, grown):
    assert torch.equal(static.sequences, grown.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(grown.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in NAMES), ("llava", "eager")])
def test_keep_all_gives_the_bits_of_a_plain_static_cache(name, attention):
    model, inputs = model_of(name), inputs_of(name)
    model.set_attn_implementation(attention)
    try:
        assert_keep_all_changes_nothing(model, inputs, **STATIC)
    finally:
        model.set_attn_implementation("sdpa")


def cases():
    """All of them in the slow matrix; every family and every way of dropping in the quick one."""
    for name in NAMES:
        for kind in CONFIGS:
            quick = name in ("llava", "qwen2_5_vl") or kind == "thresholds"
            yield pytest.param(name, kind, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("rows", [ONE, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize(("name", "kind"), [*cases()])
def test_tokens_equal_those_of_a_growing_cache(name, kind, rows):
    model, inputs = model_of(name), inputs_of(name, rows)
    grown, static, report = both(model, inputs, MustDropConfig(**CONFIGS[kind]))
    assert_same_tokens(static, grown)
    first, second = report.prompts
    assert second.final_cache.lengths == first.final_cache.lengths
    assert sum(second.final_cache.lengths) < sum(second.plain_cache.lengths)
    cache = cache_of(static)
    assert cache.get_seq_length() == static.sequences.shape[1] - 1
    filled = [int(layer.cumulative_length) for layer in cache.layers]
    assert filled == [length + NEW_TOKENS - 1 for length in second.final_cache.lengths]
    assert {layer.keys.shape[2] for layer in cache.layers} == {cache.size}


@pytest.mark.parametrize("rows", [ONE, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("kind", ["thresholds", "tower", "no eviction"])
def test_positions_as_published(kind, rows):
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    settings = {**PLAIN, **BUDGETS, **TOWER} if kind == "tower" else CONFIGS[kind]
    grown, static, _ = both(model, inputs, MustDropConfig(**settings, positions="published"))
    assert_same_tokens(static, grown)
    with drop_tokens(model, MustDropConfig(**settings)):
        assert not torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(grown.logits))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_kinds_of_masks(attention):
    model, inputs = copy.deepcopy(model_of("llava")), inputs_of("llava")
    expected, _, _ = both(model, inputs, MustDropConfig(**CONFIGS["budgets"]))
    model.set_attn_implementation({"text_config": attention})
    try:
        generate(model, inputs, **STATIC)
    except ValueError:
        pytest.skip("this version of transformers has no mask of this kind for a static cache")
    _, static, _ = both(model, inputs, MustDropConfig(**CONFIGS["budgets"]))
    assert_same_tokens(static, expected)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_sequences_of_a_prompt(settings):
    model, inputs = model_of("llava_next"), inputs_of("llava_next")
    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])):
        torch.manual_seed(3)
        grown = generate(model, inputs, **settings)
        torch.manual_seed(3)
        static = generate(model, inputs, **STATIC, **settings)
    assert torch.equal(static.sequences, grown.sequences)


# A StaticCache of one's own


def own_cache(model, length=400):
    return StaticCache(config=model.config.text_config, max_cache_len=length)


def buffers(cache):
    return [
        (layer.keys.data_ptr(), layer.values.data_ptr(), layer.cumulative_length.data_ptr()) for layer in cache.layers
    ]


def test_a_cache_that_was_handed_in_keeps_its_buffers():
    """Over prompts and resets, so that what was compiled for it, or captured in a graph, stays right."""
    model, config = model_of("llava"), MustDropConfig(**CONFIGS["thresholds"])
    cache, seen = own_cache(model), []
    with drop_tokens(model, config) as report:
        for rows in (ONE, [[5, ("picture", 0), 4]]):
            inputs = inputs_of("llava", rows)
            expected = generate(model, inputs)
            assert_same_tokens(generate(model, inputs, past_key_values=cache), expected)
            seen.append(buffers(cache))
            assert cache.get_seq_length() == expected.sequences.shape[1] - 1
            cache.reset()
            assert cache.get_seq_length() == 0
    assert seen[0] == seen[1]
    assert report.last.final_cache.bytes < report.last.plain_cache.bytes
    inputs = inputs_of("llava", [[9]])  # and outside of the context it is an ordinary one
    assert torch.equal(generate(model, inputs, past_key_values=cache).sequences, generate(model, inputs).sequences)


def test_a_cache_that_is_too_short_for_the_plain_prompt():
    """Only the tokens after stage 1 must fit: buffers of later turns can be shorter than their prompts."""
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    config = MustDropConfig(**{**PLAIN, **BUDGETS, **TOWER})
    with drop_tokens(model, config) as report:
        expected = generate(model, inputs)
        need = max(report.last.prefill_cache.lengths)
        assert need + 4 < inputs["input_ids"].shape[1]
        cache = own_cache(model, need + 4)
        assert_same_tokens(generate(model, inputs, past_key_values=cache), expected)


def turn(first, inputs, text=(40, 41, 42)):
    """The second turn's inputs."""
    more = torch.tensor([text]).repeat(len(first.sequences), 1)
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1])], 1
    )
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("positions", ["original", "published"])
@pytest.mark.parametrize("kind", ["thresholds", "no eviction"])
@pytest.mark.parametrize("rows", [ONE, PADDED], ids=["one", "padded"])
def test_a_conversation_goes_on(rows, kind, positions):
    model, inputs = model_of("llava"), inputs_of("llava", rows)
    config = MustDropConfig(**CONFIGS[kind], positions=positions)
    cache = own_cache(model)
    with drop_tokens(model, config):
        first = generate(model, inputs)
        expected = generate(model, {**turn(first, inputs), "past_key_values": cache_of(first)})
        static = generate(model, inputs, past_key_values=cache)
        assert_same_tokens(static, first)
        assert_same_tokens(generate(model, {**turn(static, inputs), "past_key_values": cache}), expected)
    with pytest.raises(RuntimeError, match="only be continued inside drop_tokens"):
        model(input_ids=torch.tensor([[40]] * len(inputs["input_ids"])), past_key_values=cache)


@pytest.mark.skipif(tiny_models.tf.__version__ < "5", reason="generate() of transformers 4 ignores such images")
@pytest.mark.parametrize("kind", ["thresholds", "no eviction"])
def test_more_images_in_a_later_turn(kind):
    model, config = model_of("llava_next"), MustDropConfig(**CONFIGS[kind])
    rows = [[3, ("picture", 0), 8], [9]], [[2, ("picture", 1), 5], [6, ("picture", 2), 7]]
    opening, more = (inputs_of("llava_next", row) for row in rows)
    results = []
    with drop_tokens(model, config):
        for cache in (None, own_cache(model, 600)):
            first = generate(model, opening, past_key_values=cache)
            generated = torch.ones(2, NEW_TOKENS, dtype=torch.long)
            mask = torch.cat([opening["attention_mask"], generated, more["attention_mask"]], 1)
            ids = torch.cat([first.sequences, more["input_ids"]], 1)
            second = {**more, "input_ids": ids, "attention_mask": mask, "past_key_values": cache_of(first)}
            results.append(generate(model, second))
    assert_same_tokens(results[1], results[0])


def test_without_generate():
    """model(**inputs) with a StaticCache, then a token at a time with what it returned, or with the caller's."""
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    cache = own_cache(model)
    with drop_tokens(model, MustDropConfig(**CONFIGS["no eviction"])), torch.no_grad():
        expected = generate(model, inputs, max_new_tokens=5)
        output = model(**inputs, past_key_values=cache)
        length = inputs["input_ids"].shape[1]
        for step in range(4):
            torch.testing.assert_close(output.logits[:, -1], expected.logits[step], atol=1e-4, rtol=0)
            token = output.logits[:, -1:].argmax(-1)
            given = cache if step % 2 else cache_of(output)
            place = torch.tensor([[length + step]])
            output = model(input_ids=token, position_ids=place, past_key_values=given)
        assert isinstance(cache_of(output), DropStaticCache)


def test_an_error_leaves_it_as_it_was():
    model, inputs = model_of("llava"), inputs_of("llava", ONE)
    cache = own_cache(model)

    def fail(*args):
        raise KeyError("injected")

    with drop_tokens(model, MustDropConfig(**CONFIGS["thresholds"])):
        first = generate(model, inputs, past_key_values=cache)
        second = {**turn(first, inputs), "past_key_values": cache}
        before = [(int(layer.cumulative_length), int(layer.dropped)) for layer in cache.layers]
        handle = model.model.language_model.layers[3].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            generate(model, second)
        handle.remove()
        assert [(int(layer.cumulative_length), int(layer.dropped)) for layer in cache.layers] == before
        expected = generate(model, {**turn(first, inputs), "past_key_values": cache_of(generate(model, inputs))})
        assert_same_tokens(generate(model, second), expected)


def test_offloaded_ones_are_refused():
    model = model_of("llava")
    cache = own_cache(model)
    cache.offloading = True
    with drop_tokens(model, MustDropConfig(**CONFIGS["budgets"])), pytest.raises(ValueError, match="offloaded static"):
        generate(model, inputs_of("llava", ONE), past_key_values=cache)
