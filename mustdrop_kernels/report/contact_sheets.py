# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: a video stage by stage, and attention from text to vision layer by layer. Requires matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import INK, PAPER, SOFT, Array, patch_of_pixel, token_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .records import ImageReport, PromptReport

_PANEL, _GAP, _MARGIN, _CAPTION, _TITLE = 1.7, 0.08, 0.25, 0.3, 0.45  # inches
_ACROSS = 6  # panels side by side in rows of any length


def draw_video(
    frames: Sequence[Array],  # as many as the video's view has, (height, width, 3) uint8
    prompt: PromptReport,
    *,
    index: int = 0,
) -> Figure:
    """One video of a prompt: a row for its frames, one for merging, one after each pruning layer.

    A merged window has the mean of its colors in each frame, dropped patches fade.
    """
    report = prompt.images[index]
    view = report.view()
    _check(frames, view.grid)
    rows: list[tuple[str, list[Array]]] = [("frames", [frame.astype(np.float64) / 255 for frame in frames])]
    parts = [view.frame(number) for number in range(view.grid[0])]
    tokens = [token_image(frame, part.token_of_patch.numpy()) for frame, part in zip(frames, parts, strict=True)]
    rows.append((f"{report.patches} become {report.tokens} tokens, {report.key_tokens} of them key", tokens))
    for layer, kept in report.kept.items():
        shown = [
            token_image(frame, part.token_of_patch.numpy(), part.survived[layer].numpy())
            for frame, part in zip(frames, parts, strict=True)
        ]
        rows.append((f"after layer {layer}: {kept} tokens", shown))
    return _sheet(rows, "Vision tokens of a video")


def draw_attention(
    frames: Sequence[Array],  # one picture, or a video's frames, (height, width, 3) uint8
    prompt: PromptReport,
    *,
    index: int = 0,
) -> Figure:
    """Attention from the text queries in each layer: the mean over them and over heads, brightest at the maximum.

    Dropped tokens are dark. Requires a report of ``drop_tokens(..., heat_maps=True)``.

    Raises:
        ValueError: no heat maps were recorded.
    """
    report = prompt.images[index]
    view = report.view()
    if not view.heat:
        raise ValueError("no heat maps were recorded: drop_tokens(model, config, heat_maps=True)")
    video = len(view.grid) == 3
    _check(frames, view.grid if video else (1, *view.grid))
    rows: list[tuple[str, list[Array]]] = []
    for layer, heat in view.heat.items():
        maps = heat.numpy() if video else heat.numpy()[None]
        most = float(np.nanmax(maps)) if not np.isnan(maps).all() else 0.0
        shown = [_glow(frame, part / most if most else part) for frame, part in zip(frames, maps, strict=True)]
        rows.append((f"layer {layer}: at most {100 * most:.2g}%", shown))
    return _sheet(rows, "Attention from text to vision", wrap=not video)


def as_frames(image: Any) -> list[Array]:
    """A picture, or a sequence of them, as arrays (height, width, 3) uint8; Pillow's images too."""
    pictures = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(pictures) == 1 and np.asarray(pictures[0]).ndim == 4:
        pictures = list(np.asarray(pictures[0]))
    arrays = [np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture) for picture in pictures]
    for array in arrays:
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(f"a picture must be (height, width, 3) uint8, got {array.shape} {array.dtype}")
    return arrays


def _check(frames: Sequence[Array], grid: Sequence[int]) -> None:
    if len(grid) != 3:
        raise ValueError("this is an image, not a video: draw_stages draws it")
    if len(frames) != grid[0]:
        raise ValueError(f"the video has {grid[0]} frames of tokens, got {len(frames)} pictures")


def _glow(frame: Array, heat: Array) -> Array:  # heat: (H, W) in 0..1, nan for dropped tokens
    """The picture in dark gray, lit by the attention."""
    import matplotlib

    heat = heat.reshape(-1)[patch_of_pixel(frame.shape[:2], heat.shape)]
    shown = np.sqrt(np.nan_to_num(heat))  # makes small shares visible
    gray = frame.astype(np.float64).mean(-1, keepdims=True) / 255
    color = matplotlib.colormaps["inferno"](shown)[..., :3]
    return np.clip(0.35 * gray * (1 - shown[..., None]) + color, 0, 1)


def _sheet(rows: list[tuple[str, list[Array]]], title: str, *, wrap: bool = False) -> Figure:
    """Panels in rows with a caption each; with `wrap`, rows of one panel stand side by side."""
    from matplotlib.figure import Figure

    across = _ACROSS if wrap else max(len(panels) for _, panels in rows)
    lines = [rows[i : i + across] for i in range(0, len(rows), across)] if wrap else [[row] for row in rows]
    first = rows[0][1][0]
    high = _PANEL * first.shape[0] / first.shape[1]
    width = 2 * _MARGIN + across * (_PANEL + _GAP) - _GAP
    height = 2 * _MARGIN + _TITLE + len(lines) * (_CAPTION + high + _GAP)
    figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER)
    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, va="top", fontsize=13, weight="bold", color=INK)
    for number, line in enumerate(lines):
        top = _MARGIN + _TITLE + number * (_CAPTION + high + _GAP) + _CAPTION
        panels = [(caption if i == 0 else "", panel) for caption, row in line for i, panel in enumerate(row)]
        for column, (caption, panel) in enumerate(panels):
            left = _MARGIN + column * (_PANEL + _GAP)
            axis: Axes = figure.add_axes((left / width, 1 - (top + high) / height, _PANEL / width, high / height))
            axis.set_axis_off()
            axis.imshow(panel, interpolation="nearest", aspect="auto")
            axis.annotate(
                caption, (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8.5,
                color=SOFT,
            )  # fmt: skip
    return figure


def pictures_of(report: ImageReport, frames: Sequence[Array]) -> list[Array]:
    """One of a video's frames for each frame of tokens; a model may merge several into one."""
    grid = report.grid
    if len(grid) != 3 or len(frames) == grid[0]:
        return list(frames)
    return [frames[number * len(frames) // grid[0]] for number in range(grid[0])]
