# SPDX-License-Identifier: Apache-2.0
"""Pictures of merged and dropped tokens of an image. Requires matplotlib, no display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .records import ImageReport, PromptReport

INK, SOFT, _FAINT, PAPER = "#1f2430", "#4b5365", "#7b8394", "#ffffff"
_MERGED, _KEY, _HATCH = "#00a9bd", "#ffc400", "#c3c8d1"
_CACHE = {"plain generation": "#e3e6eb", "before stage 3": "#9fb6d6", "after stage 3": "#1d5fa8"}
_FADED = 0.84  # blend of a dropped patch's gray with the background

# Pixels at _DPI: approximate width of a panel, whose patches have whole pixels.
_DPI, _PANEL = 150, 525
_MARGIN, _GAP, _CAPTION, _ROW_END, _TITLE, _LEGEND, _STRIP = 38, 42, 93, 18, 63, 93, 188
_AXIS_LABELS, _NOTE_LINE, _INDENT = 93, 26, 60
_COLUMNS = 3
_NOTE_CHARACTERS = 165  # of a row of three panels

Array = np.ndarray[Any, Any]


def draw_stages(
    image: Array,  # (height, width, 3) uint8, input of the vision tower
    prompt: PromptReport,
    *,
    index: int = 0,
    title: str | None = None,
    footnote: str | None = None,
) -> Figure:
    """One image of a prompt: a panel for it, one for merging, one after each pruning layer; below them the KV cache.

    Merged windows have the mean of their colors and an outline, key tokens a frame, dropped patches fade and are
    hatched. The legend lists what the panels show.
    """
    from matplotlib.figure import Figure

    report = prompt.images[index]
    panels = [_draw_image, _draw_merge, *(_after(layer) for layer in report.survived)]
    rows = -(-len(panels) // _COLUMNS)
    panel_height, panel_width = _panel(image.shape[:2], report.grid)
    row_height = _CAPTION + panel_height + _ROW_END
    notes = [part for line in (footnote or "").splitlines() for part in textwrap.wrap(line, _NOTE_CHARACTERS)]
    width = 2 * _MARGIN + _COLUMNS * panel_width + (_COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + _TITLE + rows * row_height + _LEGEND + _CAPTION + _STRIP + _AXIS_LABELS
    height += _NOTE_LINE * len(notes)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=PAPER)

    def place(left: int, top: int, wide: int, high: int) -> Axes:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def write(top: int, text: str, **style: Any) -> None:
        figure.text(_MARGIN / width, 1 - top / height, text, va="top", **style)

    top = _MARGIN
    write(top, title or "", fontsize=17, weight="bold", color=INK)
    top += _TITLE
    for i, draw in enumerate(panels):
        row, column = divmod(i, _COLUMNS)
        left = _MARGIN + column * (panel_width + _GAP)
        axis = place(left, top + row * row_height + _CAPTION, panel_width, panel_height)
        axis.set_axis_off()
        draw(axis, image, report)
    top += rows * row_height
    _legend(figure, (_MARGIN / width, 1 - (top + 12) / height), report)
    top += _LEGEND + _CAPTION
    _draw_cache(place(_MARGIN + _INDENT, top, width - 2 * _MARGIN - _INDENT, _STRIP), prompt)
    top += _STRIP + _AXIS_LABELS
    write(top, "\n".join(notes), fontsize=9.5, color=_FAINT, linespacing=1.35)
    return figure


def _panel(pixels: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of a panel with an image's proportions and patches of whole pixels."""
    wide = max(1, round(_PANEL / grid[1]))
    high = max(1, round(wide * grid[1] * pixels[0] / pixels[1] / grid[0]))
    return high * grid[0], wide * grid[1]


def save(figure: Figure, path: Path, **settings: Any) -> None:
    """Write a figure, in the format of the path's suffix; `settings` go to ``savefig``."""
    with written_whole(path) as scratch:
        figure.savefig(scratch, facecolor=figure.get_facecolor(), **settings)


def panels(columns: int, width: float, height: float, lines: int = 1, **settings: Any) -> tuple[Figure, Any]:
    """A figure of some inches and its axes (lines, columns); `settings` go to ``subplots``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **settings)


def token_image(
    image: Array,  # (height, width, 3) uint8
    token_of_patch: Array,  # (H, W) int64
    alive: Array | None = None,  # (H, W) bool
) -> Array:  # (height, width, 3) float in 0..1
    """The image by tokens: merged windows have their mean color, dropped patches are faded."""
    colors = image.astype(np.float64) / 255
    patch = patch_of_pixel(image.shape[:2], token_of_patch.shape)  # (height, width)
    token = token_of_patch.reshape(-1)[patch]
    merged = (np.bincount(token_of_patch.reshape(-1), minlength=token_of_patch.size) > 1)[token]
    means = np.stack([_mean_by(token, colors[..., channel], token_of_patch.size) for channel in range(3)], -1)
    colors[merged] = means[token][merged]
    if alive is not None:
        dropped = ~alive.reshape(-1)[patch]
        gray = colors[dropped].mean(-1, keepdims=True)
        colors[dropped] = _FADED + (1 - _FADED) * gray
    return colors


def patch_of_pixel(pixels: tuple[int, ...], grid: tuple[int, ...]) -> Array:
    """(height, width) int64: the patch of each pixel, counted row by row."""
    rows = np.arange(pixels[0]) * grid[0] // pixels[0]
    columns = np.arange(pixels[1]) * grid[1] // pixels[1]
    return rows[:, None] * grid[1] + columns


def _mean_by(group: Array, values: Array, groups: int) -> Array:
    counts = np.bincount(group.reshape(-1), minlength=groups)
    return np.bincount(group.reshape(-1), values.reshape(-1), groups) / np.maximum(counts, 1)


# ----------------------------------------------------------------------------------------------------------- panels


def _draw_image(axis: Axes, image: Array, report: ImageReport) -> None:
    height, width = report.grid
    axis.imshow(image, extent=(0, width, height, 0), interpolation="lanczos", aspect="auto")
    lines = {"color": "white", "linewidth": 0.4, "alpha": 0.35}
    axis.vlines(range(1, width), 0, height, **lines)  # type: ignore[arg-type]
    axis.hlines(range(1, height), 0, width, **lines)  # type: ignore[arg-type]
    _caption(axis, "Image", f"{report.patches} patches")


def _draw_merge(axis: Axes, image: Array, report: ImageReport) -> None:
    _draw_tokens(axis, image, report, None)
    merged = len(report.windows)
    counts = [f"{report.tokens} tokens: {merged} window{'' if merged == 1 else 's'} merged"]
    counts += [f"{report.key_tokens} key token{'' if report.key_tokens == 1 else 's'}"] if report.key_tokens else []
    _caption(axis, "Stage 1: merge in the vision tower", ", ".join(counts))


def _after(layer: int) -> Any:
    def draw(axis: Axes, image: Array, report: ImageReport) -> None:
        _draw_tokens(axis, image, report, report.survived[layer].numpy())
        layers = list(report.kept)
        before = report.tokens if layer == layers[0] else report.kept[layers[layers.index(layer) - 1]]
        kept = report.kept[layer]
        _caption(axis, f"Stage 2: after layer {layer}", f"{kept} tokens kept, {before - kept} dropped")

    return draw


def _draw_tokens(axis: Axes, image: Array, report: ImageReport, alive: Array | None) -> None:
    height, width = report.grid
    picture = token_image(image, report.token_of_patch.numpy(), alive)
    axis.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    alive = np.ones(report.grid, bool) if alive is None else alive
    _hatch(axis, ~alive)
    windows = [window for window in report.windows if alive[window[0], window[1]]]
    for window in windows:
        _frame(axis, window, _MERGED, 1.1)
    inside = np.zeros(report.grid, bool)
    for top, left, rows, columns in windows:
        inside[top : top + rows, left : left + columns] = True
        if report.key[top, left]:
            _frame(axis, (top, left, rows, columns), _KEY, 1.8)
    for top, left in np.argwhere(report.key.numpy() & alive & ~inside).tolist():
        _frame(axis, (top, left, 1, 1), _KEY, 1.8)


def _hatch(axis: Axes, patches: Array) -> None:  # (H, W) bool
    """Diagonal lines through patches, which distinguish them from pale ones."""
    from matplotlib.collections import LineCollection

    lines = [((left, top + 1), (left + 1, top)) for top, left in np.argwhere(patches).tolist()]
    axis.add_collection(LineCollection(lines, colors=_HATCH, linewidths=0.7), autolim=False)


def _frame(axis: Axes, window: Sequence[int], color: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    top, left, rows, columns = window
    inset = 0.1
    corner = (left + inset, top + inset)
    axis.add_patch(
        Rectangle(corner, columns - 2 * inset, rows - 2 * inset, fill=False, edgecolor=color, linewidth=width)
    )


def _caption(axis: Axes, title: str, counts: str, indent: int = 0) -> None:
    """Two lines above an axis, placed in points, independent of the figure's size. `indent` is in pixels."""
    where: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    left = -72 * indent / _DPI
    axis.annotate(title, xytext=(left, 22), fontsize=12.5, weight="bold", color=INK, va="bottom", **where)
    axis.annotate(counts, xytext=(left, 6), fontsize=11.5, color=SOFT, va="bottom", **where)


def _legend(figure: Figure, corner: tuple[float, float], report: ImageReport) -> None:
    """The kinds of patches that occur in the panels."""
    from matplotlib.patches import Patch

    single = "#8a93a6"
    merged, key = report.merged.numpy(), report.key.numpy()
    dropped = any(not bool(alive.all()) for alive in report.survived.values())
    entries: dict[str, tuple[bool, dict[str, Any]]] = {
        "a patch, one token": (bool((~merged).any()), {"facecolor": single, "edgecolor": "none"}),
        "merged window, one token": (bool(merged.any()), {"facecolor": single, "edgecolor": _MERGED, "linewidth": 1.6}),
        "key token, never dropped": (bool(key.any()), {"facecolor": single, "edgecolor": _KEY, "linewidth": 2.2}),
        "dropped": (dropped, {"facecolor": "#eceef1", "edgecolor": _HATCH, "linewidth": 0, "hatch": "//////"}),
    }
    handles = [Patch(label=label, **style) for label, (occurs, style) in entries.items() if occurs]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=len(handles),
        frameon=False,
        fontsize=11.5,
        handlelength=1.2,
        handleheight=1.2,
        borderaxespad=0,
        borderpad=0,
        columnspacing=1.8,
    )


def _draw_cache(axis: Axes, prompt: PromptReport) -> None:
    caches = (prompt.plain_cache, prompt.prefill_cache, prompt.final_cache)
    for (name, color), cache in zip(_CACHE.items(), caches, strict=True):
        label = f"{name}: {cache.bytes / 1e6:.1f} MB"
        axis.bar(range(len(cache.lengths)), cache.lengths, width=0.86, color=color, label=label)
    axis.set_xlim(-0.6, len(prompt.plain_cache.lengths) - 0.4)
    axis.set_xticks(range(len(prompt.plain_cache.lengths)))
    axis.set_xlabel("language layer", fontsize=11, color=SOFT)
    axis.tick_params(colors=SOFT, labelsize=10, length=0)
    axis.spines[:].set_visible(False)
    axis.yaxis.grid(True, color="white", linewidth=0.8)
    axis.yaxis.get_major_locator().set_params(nbins=3)  # type: ignore[call-arg]
    _caption(axis, "Stage 3: cut the KV cache", "tokens held by each layer, text included", indent=_INDENT)
    axis.legend(
        loc="lower right", bbox_to_anchor=(1, 1.03), ncols=3, frameon=False, fontsize=11.5, handlelength=1.2,
        borderaxespad=0, borderpad=0, columnspacing=1.8,
    )  # fmt: skip
