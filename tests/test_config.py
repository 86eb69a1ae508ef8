# SPDX-License-Identifier: Apache-2.0
"""MustDropConfig: validation, JSON round trip, presets and their numbers of tokens."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from mustdrop_kernels.config import MustDropConfig


@pytest.mark.parametrize(
    ("name", "global_threshold", "individual_threshold"),
    [("192", 0.001, 0.001), ("128", 0.0012, 0.001), ("64", 0.011, 0.01), ("64-strict", 0.005, 0.001)],
)
def test_published_presets(name, global_threshold, individual_threshold):
    config = MustDropConfig.preset(name)
    assert (config.global_threshold, config.individual_threshold) == (global_threshold, individual_threshold)
    assert (config.window, config.merge_threshold, config.key_rate) == ((3, 3), 0.8, 0.08)
    assert config.pruning_layers == (2, 6, 10, 14)
    assert config.positions == "original"
    assert config.budgets is None
    assert config.evict
    assert config.first_evicted_layer == 2


def test_default_is_preset_192():
    assert MustDropConfig() == MustDropConfig.preset("192")


@pytest.mark.parametrize("average", [192, 128, 64])
def test_budget_presets_keep_their_average(average):
    """Average number of processed vision tokens over the 32 layers of LLaVA-1.5-7B."""
    config = MustDropConfig.preset(f"budget-{average}")
    merged = 576 - config.merged_windows(64) * (math.prod(config.window) - 1)
    tokens = [merged, *config.budgets]
    processed = [tokens[sum(layer > pruning for pruning in config.pruning_layers)] for layer in range(32)]
    assert sum(processed) / 32 == average
    assert config.budgets[-1] > math.ceil(config.key_rate * merged)  # key tokens do not decide the count


def test_keep_all_scores_but_drops_nothing():
    config = MustDropConfig.preset("keep-all")
    assert config.pruning_layers
    assert not config.needs_vision_stage
    assert config.global_threshold == config.individual_threshold == 0  # nothing is below 0


def test_presets_by_name():
    presets = MustDropConfig.presets()
    budgets = {"budget-192", "budget-128", "budget-64", "small-64"}
    assert set(presets) == {"192", "128", "64", "64-strict", "keep-all", *budgets}
    assert all(MustDropConfig.preset(name) == config for name, config in presets.items())
    changed = MustDropConfig.preset("64", positions="published")
    assert changed == dataclasses.replace(presets["64"], positions="published")
    with pytest.raises(ValueError, match="no preset '63'; there are 192, 128"):
        MustDropConfig.preset("63")


@pytest.mark.parametrize("name", list(MustDropConfig.presets()))
def test_json_both_ways(name):
    config = MustDropConfig.preset(name, evict_from=1, backend="reference")
    assert MustDropConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_takes_part_and_refuses_typos():
    assert MustDropConfig.from_dict({"key_rate": 0.1}) == MustDropConfig(key_rate=0.1)
    with pytest.raises(ValueError, match=r"unknown field.*key_ratio"):
        MustDropConfig.from_dict({"key_ratio": 0.1})


def test_is_frozen_hashable_and_normalized():
    config = MustDropConfig(pruning_layers=[1, 2], budgets=[5, 5], window=[2, 3])
    assert (config.pruning_layers, config.budgets, config.window) == ((1, 2), (5, 5), (2, 3))
    assert hash(config) == hash(MustDropConfig(pruning_layers=(1, 2), budgets=(5, 5), window=(2, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key_rate = 0.5


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("merge", 1, "True or False"),
        ("evict", None, "True or False"),
        ("merge_uniform", "yes", "True or False"),
        ("merge_layer", -1, "an integer of at least 0"),
        ("merge_layer", True, "an integer of at least 0"),
        ("window", (3,), "two numbers, height and width"),
        ("window", (3, 0), "integers of at least 1"),
        ("window", (1, 1), "of more than one patch"),
        ("window", 3, "a tuple of integers"),
        ("merge_threshold", 1.5, "a number from -1 to 1"),
        ("merge_threshold", float("nan"), "a number from -1 to 1"),
        ("merge_budget", 2.5, "a number from 0 to 1"),
        ("merge_budget", -1, "an integer of at least 0"),
        ("key_rate", 1.01, "a number from 0 to 1"),
        ("key_rate", "8%", "a number from 0 to 1"),
        ("pruning_layers", (2, 2), "strictly ascending"),
        ("pruning_layers", (6, 2), "strictly ascending"),
        ("pruning_layers", (-1, 2), "integers of at least 0"),
        ("global_threshold", -0.1, "a number of at least 0"),
        ("global_threshold", float("inf"), "a number of at least 0"),
        ("individual_threshold", float("nan"), "a number of at least 0"),
        ("global_threshold", 10**400, "a number of at least 0"),
        ("pruning_layers", (1, 2**31), "a tuple of integers of at least 0"),
        ("budgets", (5, 4, 3), r"one number per pruning layer \(4\)"),
        ("budgets", (5, 4, 3, 4), "falling"),
        ("budgets", (5, 4, 3, -1), "integers of at least 0"),
        ("text_queries", "first", "one of"),
        ("evict_from", -2, "an integer of at least 0"),
        ("positions", "new", "one of"),
        ("backend", 3, "a backend's name or None"),
    ],
)
def test_refuses(field, value, sentence):
    with pytest.raises(ValueError, match=f"MustDropConfig: {field} must be {sentence}|{field} must be .*{sentence}"):
        MustDropConfig(**{field: value})


def test_refuses_uniform_with_a_budget():
    with pytest.raises(ValueError, match="merge_uniform must be False where merge_budget is given"):
        MustDropConfig(merge_budget=3, merge_uniform=True)


def test_for_depth():
    config = MustDropConfig.preset("budget-192")
    assert config.for_depth(32) == config
    short = config.for_depth(8)
    assert short.pruning_layers == (2, 6)
    assert short.budgets == config.budgets[:2]
    assert MustDropConfig().for_depth(2).pruning_layers == ()


def test_first_evicted_layer():
    assert MustDropConfig(evict=False).first_evicted_layer is None
    assert MustDropConfig(evict_from=0).first_evicted_layer == 0
    assert MustDropConfig(pruning_layers=()).first_evicted_layer is None
    assert MustDropConfig(pruning_layers=(5, 9)).first_evicted_layer == 5


def test_where_patches_merge():
    config = MustDropConfig(merge_at="features", window=(2, 3, 3))
    assert not config.merges_in_tower
    assert config.window == (2, 3, 3)
    assert MustDropConfig.from_dict(config.to_dict()) == config
    assert MustDropConfig().merges_in_tower
    assert not MustDropConfig(merge=False).merges_in_tower
    for wrong, name in (
        (dict(window=(2, 3, 3)), "window"),
        (dict(merge_at="projector"), "merge_at"),
        (dict(merge_at="features", merge_uniform=True), "merge_uniform"),
    ):
        with pytest.raises(ValueError, match=f"MustDropConfig: {name} must be"):
            MustDropConfig(**wrong)
