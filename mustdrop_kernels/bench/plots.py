# SPDX-License-Identifier: Apache-2.0
"""Pictures of a document: time against tokens, a roofline, bars of ratios. Requires matplotlib."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.plots import panels, save
from .run import Document, Row
from .shapes import parse_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#c2410c"
FLOOR = "#9ca3af"
COLORS = ("#1d4ed8", "#0891b2", "#7c3aed", "#15803d", "#be185d", "#64748b", "#a16207", "#4d7c0f", "#334155", "#0f766e")
MARKERS = "osD^v<>PX*hd"


def write_all(document: Document, folder: Path) -> list[Path]:
    """Draw the pictures for which the document has rows, one set per dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dtype in dict.fromkeys(row["dtype"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["dtype"] == dtype and row["status"] == "timed"]
        pictures = {
            "tokens": _time_against_tokens(document, rows),
            "roofline": _roofline(document, rows, dtype),
            "ratios": _ratios(document, rows),
        }
        for name, figure in pictures.items():
            if figure is None:
                continue
            path = folder / f"{document['machine']['device']}-{dtype}-{name}.png"
            save(figure, path, dpi=130, bbox_inches="tight")
            written.append(path)
    return written


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="major", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _caption(figure: Figure, document: Document, dtype: str) -> None:
    machine = document["machine"]
    what = f"{machine['name']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["name"]
    inputs = "the same inputs every time" if document["hot"] else "inputs rotated past the cache"
    figure.supxlabel(f"{what}; torch {machine['torch']}; {dtype}; {inputs}", fontsize=8, color="#6b7280")


def _ours(rows: Iterable[Row]) -> str | None:
    return next((row["candidate"] for row in rows if row["kind"] == "backend"), None)


# Time against tokens


def _family(row: Row) -> tuple[Any, ...]:
    """Shapes that differ only in the number of tokens."""
    shape = parse_shape(row["shape"])
    return dataclasses.astuple(dataclasses.replace(shape, name="", images=0, keep=0))


def _time_against_tokens(document: Document, rows: list[Row]) -> Figure | None:
    by_op: dict[str, list[Row]] = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        families: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row["op"] == op:
                families.setdefault(_family(row), []).append(row)
        best = max(families.values(), key=lambda found: len({row["tokens"] for row in found}))
        if len({row["tokens"] for row in best}) >= 3:
            by_op[op] = best
    if not by_op:
        return None
    columns = min(2, len(by_op))
    lines = -(-len(by_op) // columns)
    figure, axes = panels(columns, 7.2 * columns, 3.4 * lines, lines)
    for ax, (op, found) in zip(axes.flat, by_op.items(), strict=False):
        _tokens_panel(ax, document, op, found)
    for ax in axes.flat[len(by_op) :]:
        ax.set_visible(False)
    _caption(figure, document, rows[0]["dtype"])
    return figure


def _tokens_panel(ax: Axes, document: Document, op: str, rows: list[Row]) -> None:
    ours = _ours(rows)
    colors = iter(COLORS)
    for name in dict.fromkeys(row["candidate"] for row in rows):
        points = sorted((row for row in rows if row["candidate"] == name), key=lambda row: row["tokens"])
        x, y = [row["tokens"] for row in points], [row["median_us"] / 1e3 for row in points]
        own = points[0]["kind"] == "backend"
        color = OURS if own else next(colors)
        line = ":" if own and name != ours else "--" if points[0]["kind"] == "context" else "-"
        ax.plot(
            x, y, marker="o", markersize=4, color=color, linewidth=2.4 if name == ours else 1.3, label=name,
            zorder=3 if own else 2, linestyle=line,
        )  # fmt: skip
        low, high = [row["q1_us"] / 1e3 for row in points], [row["q3_us"] / 1e3 for row in points]
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    points = sorted((row for row in rows if row["candidate"] == ours), key=lambda row: row["tokens"])
    floor = [_floor_us(row, document) / 1e3 for row in points]
    x = [row["tokens"] for row in points]
    ax.plot(x, floor, color=FLOOR, linestyle="--", linewidth=1.5, label="floor (copy and matrix rate)")
    ax.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="ms", title=op)
    ax.set_xticks(x, [str(n) for n in x])
    ax.minorticks_off()
    _plain(ax)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _floor_us(row: Row, document: Document) -> float:
    """The time that the work's bytes or FLOPs take at the machine's measured rates, whichever is more."""
    machine = document["machine"]
    return 1e6 * max(row["bytes"] / machine["copy_bandwidth"], row["flops"] / machine["matrix_rate"][row["dtype"]])


# Roofline


def _roofline(document: Document, rows: list[Row], dtype: str) -> Figure | None:
    ours = _ours(rows)
    rows = [row for row in _of_models(rows) if row["candidate"] == ours]
    computing = [row for row in rows if row["flops"]]
    moving = [row for row in rows if not row["flops"]]
    if not computing:
        return None
    figure, axes = panels(2 if moving else 1, 13.5 if moving else 7.5, max(4.8, 0.36 * len(moving)))
    _roof_panel(axes[0][0], document, computing, dtype)
    if moving:
        _moving_panel(axes[0][1], moving)
    _caption(figure, document, dtype)
    return figure


def _roof_panel(ax: Axes, document: Document, rows: list[Row], dtype: str) -> None:
    bandwidth = document["machine"]["copy_bandwidth"]
    rate = document["machine"]["matrix_rate"][dtype]
    intensity = [row["flops"] / row["bytes"] for row in rows]
    reached = [row["flops"] / row["median_us"] / 1e3 for row in rows]  # GFLOP/s
    low, high = min(*intensity, 0.5) / 2, max(*intensity, 2 * rate / bandwidth) * 2
    ridge = rate / bandwidth
    ax.plot(
        [low, ridge, high], [low * bandwidth / 1e9, rate / 1e9, rate / 1e9], color="#374151", linewidth=1.8, zorder=1
    )
    ax.fill_between(
        [low, ridge, high], [low * bandwidth / 1e9, rate / 1e9, rate / 1e9], [1e-9] * 3, color="#f3f4f6", zorder=0
    )
    ax.annotate(f"{rate / 1e9:.0f} GFLOP/s, torch.mm", (high, rate / 1e9), (-4, 5), textcoords="offset points",
                ha="right", fontsize=8)  # fmt: skip
    ax.annotate(f"{bandwidth / 1e9:.1f} GB/s, copy", (low, low * bandwidth / 1e9), (8, 14), textcoords="offset points",
                fontsize=8)  # fmt: skip
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for i, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        for row, x, y in zip(rows, intensity, reached, strict=True):
            if row["op"] == op:
                ax.scatter(x, y, s=46, color=(OURS, *COLORS)[i % 11], marker=MARKERS[shapes.index(row["shape"]) % 12],
                           edgecolor="white", linewidth=0.6, zorder=3)  # fmt: skip
        ax.scatter([], [], s=36, color=(OURS, *COLORS)[i % 11], label=op)
    for i, shape in enumerate(shapes):
        ax.scatter([], [], s=36, color="#9ca3af", marker=MARKERS[i % 12], label=shape)
    top = max(rate / 1e9, *reached)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(*reached, low * bandwidth / 1e9) / 2, top * 2.5))
    ax.set(xlabel="FLOPs per byte that has to move", ylabel="GFLOP/s", title="operators that compute")
    _plain(ax)
    ax.legend(fontsize=7, frameon=False, loc="lower right")


def _moving_panel(ax: Axes, rows: list[Row]) -> None:
    rows = list(reversed(rows))
    share = [100 * row["copy_fraction"] for row in rows]
    ax.barh(range(len(rows)), share, color=OURS, height=0.62)
    ax.set_yticks(range(len(rows)), [f"{row['op']}, {row['shape']}" for row in rows], fontsize=8)
    for y, value in enumerate(share):
        ax.annotate(f"{value:.0f}%" if value >= 1 else f"{value:.1f}%", (value, y), (4, 0), textcoords="offset points",
                    va="center", fontsize=8)  # fmt: skip
    ax.axvline(100, color="#374151", linewidth=1.2)
    ax.set(xlabel="% of the copy bandwidth", title="operators that only move", xlim=(0, max(*share, 100) * 1.15))
    _plain(ax)
    ax.grid(axis="y", visible=False)


# Ratios


def _of_models(rows: list[Row]) -> list[Row]:
    """Rows without the shapes of the plots of time against tokens, unless there are no others."""
    models = [row for row in rows if not row["shape"].startswith("images-")]
    return models or rows


def _ratios(document: Document, rows: list[Row]) -> Figure | None:
    rows = [row for row in _of_models(rows) if row["kind"] == "baseline" and "ratio" in row]
    if not rows:
        return None
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    # The same lines in each panel.
    lines = {op: list(dict.fromkeys(row["candidate"] for row in rows if row["op"] == op)) for op in _ops(rows)}
    height = sum(len(names) + 1 for names in lines.values())
    figure, axes = panels(len(shapes), 2.4 + 5.2 * len(shapes), 0.24 * height + 1.2)
    for ax, shape in zip(axes[0], shapes, strict=True):
        _ratio_panel(ax, [row for row in rows if row["shape"] == shape], lines, first=ax is axes[0][0])
        ax.set_title(shape)
    _caption(figure, document, rows[0]["dtype"])
    return figure


def _ops(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in rows))


def _ratio_panel(ax: Axes, rows: list[Row], lines: dict[str, list[str]], first: bool) -> None:
    by_name = {(row["op"], row["candidate"]): row for row in rows}
    y, ticks = 0, []
    for op, names in lines.items():
        ax.annotate(op, (0, -y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    fontsize=9, fontweight="bold", va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
        for name in names:
            y += 1
            ticks.append((-y, name))
            if (op, name) in by_name:
                _bar(ax, by_name[op, name], -y)
        y += 1
    ax.axvline(1, color="#374151", linewidth=1.2)
    ax.set_yticks([at for at, _ in ticks], [name for _, name in ticks] if first else [], fontsize=8)
    ratios = [row["ratio"]["median"] for row in rows]
    ax.set(xscale="log", xlim=(min(0.5, *ratios) / 1.5, max(2.0, *ratios) * 3), ylim=(-y + 0.2, 0.8))
    ax.set_xlabel("time over ours, log scale; right of the line ours is faster", fontsize=9)
    ax.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    _plain(ax)
    ax.grid(axis="y", visible=False)


def _bar(ax: Axes, row: Row, y: float) -> None:
    ratio = row["ratio"]
    middle = ratio["median"]
    color = "#1d4ed8" if middle >= 1 else "#dc2626"
    ax.barh(y, middle - 1, left=1, height=0.68, color=color, alpha=0.85)
    ax.plot([ratio["q1"], ratio["q3"]], [y, y], color="#111827", linewidth=1.4)
    text = f"{middle:.0f}x" if middle >= 10 else f"{middle:.2f}x"
    ax.annotate(text, (max(ratio["q3"], 1), y), (4, 0), textcoords="offset points", va="center", fontsize=8)
