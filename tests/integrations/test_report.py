# SPDX-License-Identifier: Apache-2.0
"""The report is consistent with itself and with the cache, and has all data of a picture."""

from __future__ import annotations

import json

import pytest
import torch
from prompts import make_inputs

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens

CONFIG = MustDropConfig(pruning_layers=(1, 3), budgets=(70, 30))


@pytest.fixture(scope="module")
def run(models, processor):
    """Three images in two of three sequences, then one in one."""
    model, inputs = models["sdpa"], make_inputs(processor, "different numbers")
    with drop_tokens(model, CONFIG) as report:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        model.generate(**make_inputs(processor, "one"), max_new_tokens=2, do_sample=False)
    return report, report.prompts[0], output, inputs


def test_one_entry_per_prompt(run):
    report, prompt, _, inputs = run
    assert len(report.prompts) == 2
    assert report.last is report.prompts[1]
    assert prompt.length == inputs["input_ids"].shape[1]
    assert [image.sequence for image in prompt.images] == [0, 1, 1]
    text = inputs["attention_mask"].sum(1) - torch.tensor([144, 288, 0])
    assert prompt.text == text.tolist()


def test_counts_agree(run):
    _, prompt, _, _ = run
    for image in prompt.images:
        assert image.grid == (12, 12)
        assert image.patches == 144
        assert image.tokens == len(image.token_of_patch.unique()) == 144 - 8 * len(image.windows)
        assert image.key_tokens == len(image.token_of_patch[image.key].unique())
        for layer in CONFIG.pruning_layers:
            assert image.kept[layer] == len(image.token_of_patch[image.survived[layer]].unique())
            assert (image.survived[layer] | ~image.key).all()  # key tokens survive
        assert (image.survived[1] | ~image.survived[3]).all()
    assert len({image.tokens for image in prompt.images}) > 1
    for layer, budget in zip(CONFIG.pruning_layers, CONFIG.budgets, strict=True):
        assert prompt.images[0].kept[layer] == budget
        assert prompt.images[1].kept[layer] + prompt.images[2].kept[layer] == budget  # a sequence's images together
    merged = sum(image.tokens for image in prompt.images)
    assert prompt.layer_tokens == [merged] * 2 + [2 * 70] * 2 + [2 * 30] * 4
    assert prompt.mean_tokens == pytest.approx(sum(prompt.layer_tokens) / 8 / 3)


def test_windows_in_patch_coordinates(run):
    _, prompt, _, _ = run
    for image in prompt.images:
        merged = torch.zeros(12, 12, dtype=torch.bool)
        for row, column, height, width in image.windows:
            assert (row % 3, column % 3, height, width) == (0, 0, 3, 3)
            window = image.token_of_patch[row : row + 3, column : column + 3]
            assert (window == row * 12 + column).all()  # named by its first patch
            merged[row : row + 3, column : column + 3] = True
        assert torch.equal(image.merged, merged)
        assert merged.any()
        alone = torch.arange(144).view(12, 12)[~merged]
        assert torch.equal(image.token_of_patch[~merged], alone)


def test_cache_bytes_are_the_caches(run):
    _, prompt, output, _ = run
    cache = output.past_key_values
    decoded = 2
    layers = [cache.stored(i) for i in range(8)]
    assert prompt.final_cache.lengths == [keys.shape[2] - decoded for keys, _ in layers]
    slot = 2 * keys_bytes(layers[0][0])
    assert prompt.final_cache.bytes == sum(prompt.final_cache.lengths) * slot
    assert prompt.prefill_cache.bytes == sum(prompt.prefill_cache.lengths) * slot
    assert prompt.plain_cache.bytes == 8 * prompt.length * slot
    assert prompt.final_cache.bytes < prompt.prefill_cache.bytes < prompt.plain_cache.bytes


def keys_bytes(keys):
    batch, heads, _, dim = keys.shape
    return batch * heads * dim * keys.element_size()


def test_times_per_stage(run):
    _, prompt, _, _ = run
    assert list(prompt.milliseconds) == ["merge", "key tokens", "layer 1", "layer 3", "evict"]
    assert all(time > 0 for time in prompt.milliseconds.values())


def test_json(run):
    report, prompt, _, _ = run
    read = json.loads(json.dumps(report.to_dict()))
    assert MustDropConfig.from_dict(read["config"]) == CONFIG
    image = read["prompts"][0]["images"][0]
    assert torch.equal(torch.tensor(image["token_of_patch"]), prompt.images[0].token_of_patch)
    assert torch.equal(torch.tensor(image["survived"]["3"]).bool(), prompt.images[0].survived[3])
    assert image["kept"] == {"1": 70, "3": 30}
    assert read["prompts"][0]["final_cache"]["bytes"] == prompt.final_cache.bytes


def test_table(run):
    from rich.console import Console

    report, prompt, _, _ = run

    def text(table):
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table)
        return console.export_text()

    several, one = text(report.table(prompt)), text(report.table())
    assert "kept of each" in several
    assert "kept of each" not in one
    for stage, before, after in (("2 after layer 1", prompt.layer_tokens[0], 140), ("2 after layer 3", 140, 60)):
        (line,) = [line for line in several.splitlines() if stage in line]
        assert [str(before), str(after)] == [cell.strip() for cell in line.split("│")[2:4]]


def test_no_prompt_yet(sdpa):
    with drop_tokens(sdpa, CONFIG) as report, pytest.raises(LookupError, match="no prompt with an image"):
        report.table()
    assert report.to_dict() == {"config": CONFIG.to_dict(), "prompts": []}


def test_a_failed_prompt_leaves_no_times_behind(sdpa, one):
    def fail(*args):
        raise KeyboardInterrupt

    with drop_tokens(sdpa, CONFIG) as report:
        handle = sdpa.model.language_model.layers[5].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            sdpa.generate(**one, max_new_tokens=2)
        handle.remove()
        assert report.prompts == []
        sdpa.generate(**one, max_new_tokens=2)
        first = report.last.milliseconds
    assert len(report.prompts) == 1
    assert list(first) == ["merge", "key tokens", "layer 1", "layer 3", "evict"]
