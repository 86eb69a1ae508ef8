# SPDX-License-Identifier: Apache-2.0
"""Every family: keep-all gives the bits of plain ``generate``, dropping equals the masked reference.

One batch holds requests of every kind: one image, several of different sizes, text alone, a video, both.
"""

from __future__ import annotations

import functools

import pytest
import tiny_models
import torch
from masked_reference import MaskedReference
from tiny_models import FAMILIES, IMAGE, VIDEO

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens
from mustdrop_kernels.integrations.transformers.families import family_of

NEW_TOKENS = 4
PLAIN = dict(pruning_layers=(1, 3), key_rate=0.1, merge=False)
THRESHOLDS = dict(global_threshold=0.012, individual_threshold=0.03)
BUDGETS = dict(budgets=(30, 10))
TOWER = dict(merge=True, window=(2, 2), merge_threshold=0.4)
FEATURES = dict(merge=True, merge_at="features", window=(2, 2), merge_threshold=0.3)
FRAMES = {**FEATURES, "window": (2, 2, 2)}
WHOLE = ("llava_next_video", "llava_onevision", "llava_onevision shrunk", "qwen2_5_vl", "internvl")
"""Families with images or videos in this batch whose patches cannot merge in the tower."""
ONE = [[3, ("picture", 1), 8]]
"""A prompt with one image."""


@functools.cache
def model_of(name):
    return tiny_models.model_of(FAMILIES[name])


def inputs_of(name, rows=None):
    model = model_of(name)
    if rows is None:
        rows = [[3, ("picture", 0), 8], [4, ("picture", 1), 2, ("picture", 2), 5], [9]]
        if "video" in family_of(model).modalities and "shrunk" not in name:
            rows += [[2, ("picture", 100), 6], [2, ("picture", 1), 3, ("picture", 101), 6]]
    inputs = tiny_models.batch(FAMILIES[name], model.config, rows)
    ids = inputs["input_ids"]
    if name == "qwen2_5_vl" and tiny_models.tf.__version__ > "5":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def generate(model, inputs, **settings):
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **settings}
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **settings)


def cache_of(output):
    return getattr(output, "cache", None) or output.past_key_values


def assert_same_bits(ours, plain):
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))


def assert_keep_all_changes_nothing(model, inputs, **settings):
    """Dropping that keeps everything gives the bits of plain generate(); returns its report."""
    plain = generate(model, inputs, **settings)
    with drop_tokens(model, MustDropConfig.preset("keep-all", pruning_layers=(1, 3))) as report:
        assert_same_bits(generate(model, inputs, **settings), plain)
    return report


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_gives_the_same_bits(name):
    report = assert_keep_all_changes_nothing(model_of(name), inputs_of(name))
    assert report.last.layer_tokens == [sum(image.patches for image in report.last.images)] * tiny_models.LAYERS


def configs(name):
    found = {"thresholds": {**PLAIN, **THRESHOLDS}, "features": {**PLAIN, **BUDGETS, **FEATURES}}
    if name == "llava_onevision":
        # A video's frame has 2 x 2 tokens here. Merged into one, its importance is the mean of all that a frame
        # receives, which is the same for each frame: rounding would choose the key tokens.
        found["features"]["window"] = (1, 2)
    if name not in WHOLE:
        found["tower"] = {**PLAIN, **BUDGETS, **TOWER}
    if "video" in name or "qwen" in name or name == "llava_onevision":
        found["frames"] = {**PLAIN, **THRESHOLDS, **FRAMES}
    return found


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in FAMILIES for kind in configs(name)])
def test_equals_masked_reference(name, kind):
    model, inputs, config = model_of(name), inputs_of(name), MustDropConfig(**configs(name)[kind])
    with drop_tokens(model, config) as report:
        output = generate(model, inputs)
    reference = MaskedReference(model, config)
    reference.check(output, inputs, NEW_TOKENS)

    last = report.last
    placeholders = sum(int((inputs["input_ids"] == token).sum()) for token in (IMAGE, VIDEO))
    assert sum(image.patches for image in last.images) == placeholders
    assert sum(image.key_tokens for image in last.images) == int(reference.key.sum()) > 0
    assert sum(image.tokens for image in last.images) == int(reference.vision.sum())
    assert (int(reference.vision.sum()) < placeholders) == config.merge
    for layer in config.pruning_layers:
        left = int((reference.alive[layer + 1] & reference.vision).sum())
        assert sum(image.kept[layer] for image in last.images) == left
    assert left < last.layer_tokens[0]
    assert last.final_cache.bytes < last.plain_cache.bytes


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_towers_that_need_all_their_patches(name):
    model = model_of(name)
    with pytest.raises(ValueError, match=r"cannot merge inside this model's vision tower.*merge_at='features'"):
        drop_tokens(model, MustDropConfig(**{**PLAIN, **TOWER})).__enter__()


@pytest.mark.parametrize(("name", "picture"), [("llava_next_video", 100), ("llava_onevision shrunk", 1)])
def test_pictures_that_need_all_their_patches(name, picture):
    """Other pictures of the same model can merge in the tower."""
    model, config = model_of(name), MustDropConfig(**{**PLAIN, **BUDGETS, **TOWER})
    with drop_tokens(model, config) as report:
        generate(model, inputs_of(name, [[3, ("picture", 2), 8]]))
        with pytest.raises(ValueError, match="cannot merge inside this model's vision tower"):
            generate(model, inputs_of(name, [[3, ("picture", picture), 8]]))
    assert len(report.prompts) == 1


def test_positions_that_cannot_be_renumbered():
    for name, changes, sentence in (
        ("qwen2_5_vl", {}, "several positions each"),
        ("llava_next", TOWER, "LLaVA-1.5 alone"),
    ):
        with pytest.raises(ValueError, match=sentence):
            drop_tokens(model_of(name), MustDropConfig(**{**PLAIN, **changes}, positions="published")).__enter__()
