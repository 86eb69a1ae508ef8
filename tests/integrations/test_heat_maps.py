# SPDX-License-Identifier: Apache-2.0
"""Heat maps equal the attention of a plain run; drawings of a report."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_families import BUDGETS, PLAIN, generate, inputs_of, model_of
from tiny_models import FAMILIES, IMAGE, LAYERS
from tiny_models import FRAMES as FRAME_COUNT
from tiny_models import model_of as build

from mustdrop_kernels.config import MustDropConfig
from mustdrop_kernels.integrations.transformers import drop_tokens


@pytest.fixture(scope="module")
def run():
    """An image in one row, a video in another; nothing is dropped before layer 2."""
    model = build(FAMILIES["llava_next_video"], attention="eager")
    inputs = inputs_of("llava_next_video", [[3, ("picture", 1), 8], [2, ("picture", 100), 6]])
    config = MustDropConfig(**PLAIN, **BUDGETS)
    with drop_tokens(model, config, heat_maps=True) as report:
        generate(model, inputs, max_new_tokens=2)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
    return report, plain.attentions, inputs


def test_heat_maps_are_the_plain_models_attention(run):
    report, attentions, inputs = run
    image = report.last.images[0]
    assert list(image.heat) == list(range(LAYERS))
    ids = inputs["input_ids"][0]
    assert image.tokens == image.patches  # layers 0 and 1 read all of it
    begin = int((ids == IMAGE).nonzero().max()) + 1
    for layer in (0, 1):
        expected = attentions[layer][0, :, begin:].mean((0, 1))[ids == IMAGE]
        torch.testing.assert_close(image.heat[layer], expected, atol=1e-5, rtol=1e-4)
    for layer in (2, 3):
        assert torch.equal(image.heat[layer].isnan(), ~image.alive[1])
    for layer in (4, 5):
        assert torch.equal(image.heat[layer].isnan(), ~image.alive[3])


def test_maps_of_a_view(run):
    report, _, _ = run
    image, video = report.last.images
    assert image.grid == (8, 6)
    assert image.view(0).grid == (4, 4)
    assert video.grid == (FRAME_COUNT, 2, 2)
    view = image.view()
    assert torch.equal(view.heat[0].flatten(), image.heat[0][image.views[-1]].flatten())
    frame = video.view().frame(1)
    assert torch.equal(frame.survived[3], video.survived[3][1])
    assert frame.token_of_patch.max() < 4


def test_json_has_the_heat_maps(run):
    report, _, _ = run
    read = json.loads(report.to_json(indent=1))
    image, video = read["prompts"][0]["images"]
    assert (image["modality"], video["modality"]) == ("image", "video")
    assert np.shape(image["heat"]["0"]) == (8, 6)
    assert np.shape(image["other_views"][0]["heat"]["5"]) == (4, 4)
    assert np.shape(video["heat"]["5"]) == (FRAME_COUNT, 2, 2)
    assert min(np.min(video["heat"]["5"]), 0) in (-1, 0)


def picture(seed=0):
    return np.random.RandomState(seed).randint(0, 256, (48, 36, 3), dtype=np.uint8)


def captions(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts if text.get_text()]


def test_plots(run, tmp_path):
    report, _, _ = run
    frames = [picture(seed) for seed in range(6)]  # the model took fewer
    sheet = report.plot(frames, index=1)
    video = report.last.images[1]
    assert captions(sheet)[1] == f"{video.patches} become {video.tokens} tokens, {video.key_tokens} of them key"
    assert f"after layer 3: {video.kept[3]} tokens" in captions(sheet)
    assert len(sheet.axes) == 4 * FRAME_COUNT
    np.testing.assert_array_equal(sheet.axes[1].images[0].get_array(), frames[2] / 255)

    heat = report.plot_attention(picture())
    assert len(heat.axes) == LAYERS
    assert captions(heat)[0].startswith("layer 0: at most ")
    assert len(report.plot_attention(frames, index=1).axes) == LAYERS * FRAME_COUNT
    report.plot(picture()).savefig(tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_refused(run):
    report, _, _ = run
    with pytest.raises(ValueError, match=r"must be \(height, width, 3\) uint8"):
        report.plot(np.zeros((4, 4)))
    model = model_of("llava")
    with drop_tokens(model, MustDropConfig(**PLAIN, **BUDGETS)) as other:
        generate(model, inputs_of("llava"))
    with pytest.raises(ValueError, match="heat_maps=True"):
        other.plot_attention(picture())
