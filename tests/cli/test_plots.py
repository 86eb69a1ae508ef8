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
    assert {"A title", "A note", "36 patches", "28 tokens: 1 window merged, 2 key tokens"} <= set(words)
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
    assert "27 tokens: 1 window merged, 5 key tokens" in words


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


def without(part: str, layers: tuple[int, ...] = (1, 3)) -> ImageReport:
    """The report without merged windows, key tokens or dropped patches."""
    whole = report(layers)
    if part == "merged":
        return dataclasses.replace(whole, token=torch.arange(36))
    if part == "key":
        return dataclasses.replace(whole, keys=torch.zeros(36, dtype=torch.bool), key_tokens=0)
    if part == "dropped":
        return dataclasses.replace(whole, alive={layer: torch.ones(36, dtype=torch.bool) for layer in layers})
    return whole


@pytest.mark.parametrize("missing", ["", "merged", "key", "dropped"])
def test_the_legend_lists_what_is_drawn(missing) -> None:
    shown = without(missing)
    figure = draw_stages(picture(), prompt(shown))
    (legend,) = figure.legends
    entries = [text.get_text().split()[0].rstrip(",") for text in legend.get_texts()]
    assert entries == [name for name in ("a", "merged", "key", "dropped") if name != missing]
    panels = [axis for axis in figure.axes if axis.images]
    frames = {patch.get_edgecolor()[:3] for axis in panels for patch in axis.patches}
    assert len(frames) == len({"merged", "key"} & set(entries)), "a color of frames for each of the two"
    hatched = sum(len(lines.get_segments()) for axis in panels for lines in axis.collections if lines.get_zorder() == 2)
    dropped = sum(int((~alive).sum()) for alive in shown.survived.values())
    grid = 2 * 5  # of the first panel: vlines, hlines
    assert hatched - grid == dropped


def test_no_key_tokens_are_not_counted() -> None:
    words = [text.get_text() for axis in draw_stages(picture(), prompt(without("key"))).axes for text in axis.texts]
    assert "28 tokens: 1 window merged" in words


@pytest.mark.parametrize("wide", [False, True])
def test_patches_have_whole_pixels(wide) -> None:
    shown = report()
    if wide:
        twice = torch.arange(72).reshape(6, 12)
        alive = {layer: mask.repeat(2) for layer, mask in shown.alive.items()}
        shown = dataclasses.replace(
            shown, views=(twice,), token=torch.arange(72), keys=shown.keys.repeat(2), alive=alive
        )
    figure = draw_stages(picture(), prompt(shown))
    size = figure.get_size_inches() * figure.dpi
    np.testing.assert_allclose(size, np.round(size), atol=1e-6)
    rows, columns = shown.grid
    for axis in figure.axes:
        if axis.images:
            box = axis.get_window_extent()
            np.testing.assert_allclose((box.x0, box.y0), np.round((box.x0, box.y0)), atol=1e-6)
            sides = box.width / columns, box.height / rows
            np.testing.assert_allclose(sides, np.round(sides), atol=1e-6)
            np.testing.assert_allclose(box.width, box.height, rtol=0.02)  # the picture's proportions


def test_windows_are_framed_where_they_are() -> None:
    """The frame of the merged window of 3x3 patches lies inside its 3x3 patches."""
    axis = draw_stages(picture(), prompt(report())).axes[1]
    frames = [patch.get_bbox() for patch in axis.patches]
    window = next(frame for frame in frames if frame.width > 1)
    np.testing.assert_allclose((window.x0, window.y0, window.x1, window.y1), (0.1, 0.1, 2.9, 2.9))
