# SPDX-License-Identifier: Apache-2.0
"""The picture, drawn from a made-up report."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from mustdrop_kernels.report import CacheReport, ImageReport, PromptReport
from mustdrop_kernels.report.plots import draw_stages, save, token_image


def report(layers: tuple[int, ...] = (1, 3)) -> ImageReport:
    """6x6 patches, the first window merged; the first cut drops the lower half, the second all but key tokens."""
    token = torch.arange(36).reshape(6, 6)
    token[:3, :3] = 0
    key = torch.zeros(6, 6, dtype=torch.bool)
    key[:3, :3] = key[0, 5] = True
    alive = torch.arange(36).reshape(6, 6) < 18
    survived = dict(zip(layers, (alive, alive & key), strict=False))
    kept = {layer: int(token[mask].unique().numel()) for layer, mask in survived.items()}
    alive = {layer: mask.flatten() for layer, mask in survived.items()}
    views = (torch.arange(36).reshape(6, 6),)
    return ImageReport(0, "image", views, token.flatten(), key.flatten(), alive, kept, tokens=28, key_tokens=2)


def prompt(*images: ImageReport) -> PromptReport:
    caches = [CacheReport([length] * 4, 1000 * length) for length in (40, 30, 12)]
    return PromptReport(40, [4], list(images), [28, 28, 10, 2], *caches, milliseconds={})


def picture() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (84, 84, 3), dtype=np.uint8)


def test_merged_windows_have_their_mean_color_and_others_their_pixels() -> None:
    image = picture()
    shown = token_image(image, report().token_of_patch.numpy())
    mean = image[:42, :42].reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(shown[:42, :42], np.broadcast_to(mean, (42, 42, 3)))
    np.testing.assert_array_equal(shown[42:], image[42:] / 255)
    np.testing.assert_array_equal(shown[:, 42:], image[:, 42:] / 255)


def test_dropped_patches_fade_and_kept_ones_do_not() -> None:
    image, first = picture(), report().survived[1].numpy()
    shown = token_image(image, report().token_of_patch.numpy(), first)
    np.testing.assert_array_equal(shown[:42, 42:], image[:42, 42:] / 255)
    faded = shown[42:]
    assert faded.min() > 0.8
    assert np.ptp(faded, axis=-1).max() < 1e-12, "gray"
    assert np.ptp(faded) > 0.05, "still a hint of what was there"


@pytest.mark.parametrize("layers", [(), (1,), (1, 3)])
def test_captions_say_how_many(layers) -> None:
    figure = draw_stages(picture(), prompt(report(layers)), title="A title", footnote="A note")
    words = [text.get_text() for axis in figure.axes for text in axis.texts] + [t.get_text() for t in figure.texts]
    assert {"A title", "A note", "36 patches", "28 tokens; 1 windows merged, 2 key"} <= set(words)
    # 18 patches in the upper half, 9 of them one token: 10 tokens; the key tokens alone at the end.
    expected = {1: "10 tokens kept, 18 dropped", 3: "2 tokens kept, 8 dropped"}
    for layer, counts in expected.items():
        assert (counts in words) == (layer in layers)
        assert (f"Stage 2: after layer {layer}" in words) == (layer in layers)


def test_panels_fade_more_and_more(tmp_path) -> None:
    figure = draw_stages(picture(), prompt(report()))
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    changed = [np.abs(np.asarray(panel, float) - shown[1]).max(-1).mean() for panel in shown[1:]]
    assert changed == sorted(changed)
    assert changed[0] == 0 < changed[1] < changed[2]


def test_second_image_of_a_prompt() -> None:
    other = dataclasses.replace(report(), tokens=27, key_tokens=5)
    figure = draw_stages(picture(), prompt(report(), other), index=1)
    words = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert "27 tokens; 1 windows merged, 5 key" in words


def test_saved_at_the_size_of_the_figure(tmp_path) -> None:
    figure = draw_stages(picture(), prompt(report()))
    save(figure, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as saved:
        size = figure.get_size_inches() * figure.dpi
        assert saved.size == tuple(int(side) for side in size)


def test_wide_images_have_flat_panels() -> None:
    wide = np.concatenate([picture(), picture()], 1)
    square, flat = draw_stages(picture(), prompt(report())), draw_stages(wide, prompt(report()))
    assert flat.get_figheight() < square.get_figheight()
