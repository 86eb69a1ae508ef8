# SPDX-License-Identifier: Apache-2.0
"""Operations and KV bytes against torch's counter and published figures."""

from __future__ import annotations

import pytest
import tiny_llava
import torch
from torch.utils.flop_counter import FlopCounterMode

from mustdrop_kernels import flops
from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

SEVEN = flops.MODELS["llava-1.5-7b"]


@pytest.fixture
def model():
    return tiny_llava.model(layers=16)


def counted(model, inputs) -> int:
    """Operations that torch counts in the decoder layers for a prompt."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    layers = [name for name in counter.get_flop_counts() if name.split(".")[-1].isdigit() and "language" in name]
    return sum(sum(counter.get_flop_counts()[name].values()) for name in layers)


def test_exact_agrees_with_torch(model) -> None:
    model.set_attn_implementation("eager")  # every matrix product is a matrix product
    inputs = tiny_llava.processor()(images=tiny_llava.picture(), text=tiny_llava.PROMPT, return_tensors="pt")
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - vision
    sizes = flops.LanguageModel.of(model.config)
    assert sizes.vision == vision
    assert counted(model, inputs) == flops.account(sizes, [vision] * sizes.layers, text=text).flops

    config = MustDropConfig(merge_budget=8, budgets=(60, 40, 20, 12), key_rate=0.0)
    processed, held = flops.schedule(sizes, config)
    found = flops.account(sizes, processed, held, text=text, element_size=4)
    with drop_tokens(model, config) as report:
        model(**inputs, use_cache=True)
    assert report.last.layer_tokens == processed
    assert report.last.final_cache.bytes == found.bytes
    assert report.last.plain_cache.bytes == found.plain_bytes
    assert found.mean_tokens == report.last.mean_tokens


@pytest.mark.parametrize(("name", "tokens"), [("budget-192", 192), ("budget-128", 128), ("budget-64", 64)])
def test_presets_keep_the_tokens_of_their_names(name, tokens) -> None:
    processed, held = flops.schedule(SEVEN, MustDropConfig.preset(name))
    assert sum(processed) == tokens * SEVEN.layers
    assert held[:2] == processed[:2], "layers before the first pruning layer keep everything"
    assert set(held[2:]) == {processed[-1]}


def test_countings_by_hand() -> None:
    n, d, m = 576, 4096, 11008
    assert SEVEN.layer_flops(n, "fastv") == 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    assert SEVEN.layer_flops(n, "pdrop") == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    assert SEVEN.layer_flops(n, "exact") == 2 * SEVEN.layer_flops(n, "pdrop"), "two for a multiply-add"
    grouped = flops.LanguageModel(28, 3584, 18944, 28, 4)
    projections = 2 * n * (2 * 3584 * 3584 + 2 * 3584 * 512)
    assert grouped.layer_flops(n) == projections + 4 * n * n * 3584 + 6 * n * 3584 * 18944
    assert grouped.token_bytes(2) == 2 * 4 * 128 * 2


def test_the_published_figure_is_among_the_countings() -> None:
    """88.5%: 320 of 2880 vision tokens beside the text of an ordinary question come within a tenth of a point."""
    rows = flops.headline()
    assert len(rows) == 12
    nearest = min(rows, key=lambda row: abs(row["saved"] - 0.885))
    assert (nearest["model"], nearest["text"], nearest["counting"]) == ("llava-next-7b", 60, "fastv")
    assert nearest["saved"] == pytest.approx(0.885, abs=1e-3)


def test_a_merge_budget_adapts_to_the_windows_of_the_image() -> None:
    """576 patches are 64 windows of 9; a merged one saves 8 tokens."""
    for budget, merged in ((8, 8), (64, 64), (72, 64), (0.5, 32), (1.0, 64)):
        processed, _ = flops.schedule(SEVEN, MustDropConfig(merge_budget=budget, budgets=(1, 1, 1, 1)))
        assert processed[0] == 576 - 8 * merged


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flops.schedule(SEVEN, MustDropConfig()), "thresholds"),
        (lambda: flops.account(SEVEN, [64]), "32 counts"),
        (lambda: flops.account(SEVEN, [64] * 32, [-1] * 32), "held"),
        (lambda: flops.account(SEVEN, [64] * 32, text=-1), "text"),
        (lambda: SEVEN.layer_flops(1, "other"), "counting"),
        (lambda: flops.LanguageModel.of(tiny_llava.model().config.text_config), "vision"),
    ],
)
def test_refusals(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()
