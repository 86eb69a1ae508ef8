# SPDX-License-Identifier: Apache-2.0
"""generate with real dropping equals the masked reference, in which nothing is shortened."""

from __future__ import annotations

import emulated_flash
import pytest
import tiny_llava
import torch
from masked_reference import MaskedReference

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

THRESHOLDS = dict(pruning_layers=(1, 3, 5), global_threshold=0.01, individual_threshold=0.02)
BUDGETS = dict(pruning_layers=(1, 3, 5), budgets=(70, 40, 20))
CONFIGS = {
    "thresholds": THRESHOLDS,
    "budgets": BUDGETS,
    "without merging": {**THRESHOLDS, "merge": False},
    "merge only": dict(pruning_layers=()),
    "merge budget": {**BUDGETS, "merge_budget": 7},
    "later merge, other window": {**THRESHOLDS, "merge_layer": 1, "window": (2, 4), "merge_threshold": 0.5},
    "windows cut by the border": {**THRESHOLDS, "window": (5, 5)},
    "no key tokens": {**BUDGETS, "key_rate": 0.0},
    "more key tokens than budget": {**BUDGETS, "key_rate": 0.4},
    "last token as query": {**BUDGETS, "text_queries": "last"},
    "no eviction": {**THRESHOLDS, "evict": False},
    "eviction everywhere": {**THRESHOLDS, "evict_from": 0},
    "every layer": dict(pruning_layers=tuple(range(8)), budgets=(90, 80, 70, 60, 50, 40, 30, 20)),
    "no vision token left": dict(pruning_layers=(2, 4), budgets=(30, 0), key_rate=0.0),
}
NEW_TOKENS = 6


def run(model, config, inputs, **settings):
    with drop_tokens(model, config) as report:
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **settings},
        )
    return output, report


@pytest.mark.parametrize(
    ("attention", "name"),
    [("sdpa", name) for name in CONFIGS] + [("eager", name) for name in ("thresholds", "budgets", "no eviction")],
)
def test_equals_masked_reference(attention, name, models, inputs):
    check_against_masked_reference(models[attention], MustDropConfig(**CONFIGS[name]), inputs)


@pytest.mark.parametrize("name", ["thresholds", "budgets", "no eviction"])
def test_masks_for_flash_attention(name, sdpa, inputs):
    with emulated_flash.on(sdpa):
        check_against_masked_reference(sdpa, MustDropConfig(**CONFIGS[name]), inputs)


def check_against_masked_reference(model, config, inputs):
    output, report = run(model, config, inputs)
    reference = MaskedReference(model, config)
    reference.check(output, inputs, NEW_TOKENS)
    prompt = inputs["input_ids"]
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)

    # It did drop, what the reference dropped, and the cache holds no more.
    last = report.last
    before, after = last.prefill_cache.lengths, last.final_cache.lengths
    assert sum(after) < sum(last.plain_cache.lengths)
    assert before == [int(alive.sum(1).max()) for alive in reference.alive[:-1]]
    assert after == [int(reference.seen_at_decode(layer).sum(1).max()) for layer in range(len(after))]
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [n + NEW_TOKENS - 1 for n in after]
    for layer in config.pruning_layers:
        alive = reference.alive[layer + 1] & reference.vision
        assert sum(image.kept[layer] for image in last.images) == int(alive.sum())


@pytest.mark.parametrize("positions", ["original", "published"])
@pytest.mark.parametrize("settings", [THRESHOLDS, BUDGETS], ids=["thresholds", "budgets"])
def test_batch_equals_each_alone(positions, settings, model, padded):
    config = MustDropConfig(positions=positions, **settings)
    together, _ = run(model, config, padded)
    for row in range(2):
        real = padded["attention_mask"][row].bool()
        alone = {
            "input_ids": padded["input_ids"][row, real][None],
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
            "pixel_values": padded["pixel_values"][row : row + 1],
        }
        single, _ = run(model, config, alone)
        assert torch.equal(single.sequences[0, -NEW_TOKENS:], together.sequences[row, -NEW_TOKENS:])
        torch.testing.assert_close(
            torch.stack(single.logits, 1)[0], torch.stack(together.logits, 1)[row], atol=1e-4, rtol=0
        )


def test_beams_equal_masked_reference(model, padded):
    config = MustDropConfig(**THRESHOLDS)
    output, _ = run(model, config, padded, num_beams=3)
    tokens, _ = MaskedReference(model, config).generate(padded, NEW_TOKENS, num_beams=3)
    assert torch.equal(output.sequences[:, -NEW_TOKENS:], tokens)


def test_sampling_equals_masked_reference(model, padded):
    config = MustDropConfig(**THRESHOLDS)
    settings = dict(do_sample=True, temperature=1.5, num_return_sequences=2)
    torch.manual_seed(5)
    output, _ = run(model, config, padded, **settings)
    torch.manual_seed(5)
    tokens, _ = MaskedReference(model, config).generate(padded, NEW_TOKENS, **settings)
    assert output.sequences.shape[0] == 4
    assert torch.equal(output.sequences[:, -NEW_TOKENS:], tokens)


def test_depths(processor, one):
    """Any number of layers; a layer that is not there is refused, and for_depth leaves it out."""
    for layers in (1, 3, 7):
        model = tiny_llava.model(layers=layers)
        config = MustDropConfig(global_threshold=0.01, individual_threshold=0.02)
        if layers < 15:
            with pytest.raises(ValueError, match=f"pruning_layers.*has {layers} layers"), drop_tokens(model, config):
                pass
        config = config.for_depth(layers)
        output, _ = run(model, config, one)
        MaskedReference(model, config).check(output, one, NEW_TOKENS)
