# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of docs/method.md from results of the operators: python tools/method_figures.py [FOLDER]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import mustdrop_kernels as mk

SIDE, WINDOW, THRESHOLD = 9, 3, 0.97
INK, SOFT, LINE, KEY, GONE = "#1f2430", "#4b5365", "#00a9bd", "#ffc400", "#dfe2e7"
TEXT, VISION = "#1d5fa8", "#7fb0dd"


def figure(columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """An empty drawing without axes."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(1, columns)
    for ax in axes if columns > 1 else [axes]:
        ax.set_aspect("equal")
        ax.axis("off")
    return drawn, axes


def cell(ax: Any, left: float, top: float, color: Any, size: float = 1, **style: Any) -> None:
    """A square whose upper left corner is given."""
    ax.add_patch(
        Rectangle((left, top), size, size, facecolor=color, **{"edgecolor": "white", "linewidth": 0.8, **style})
    )


def scene() -> torch.Tensor:  # (SIDE, SIDE, 3), colors from 0 to 1
    """A sky, a field, and an object with details in the middle."""
    generator = torch.Generator().manual_seed(3)
    picture = torch.empty(SIDE, SIDE, 3)
    picture[:5], picture[5:] = torch.tensor([0.55, 0.75, 0.95]), torch.tensor([0.45, 0.65, 0.35])
    picture += 0.03 * torch.randn(SIDE, SIDE, 3, generator=generator)
    picture[3:7, 2:7] = torch.rand(4, 5, 3, generator=generator)
    return picture.clamp(0, 1)


def merge() -> Figure:
    """Stage 1: windows with their similarities, and the merged tokens."""
    picture = scene()
    merged = mk.spatial_merge(picture.view(1, -1, 3), [SIDE, SIDE], [WINDOW, WINDOW], THRESHOLD, num_prefix_tokens=0)
    unit = torch.nn.functional.normalize(picture, dim=-1)
    drawn, (before, after) = figure(2, 8, 4.1)
    before.set_title(f"{SIDE * SIDE} tokens, similarity of each window", color=INK, fontsize=10)
    after.set_title(f"{int(merged.counts)} tokens at threshold {THRESHOLD}", color=INK, fontsize=10)
    tokens, assignment, sizes = merged.tokens[0], merged.assignment[0], merged.sizes[0]
    for row in range(SIDE):
        for column in range(SIDE):
            cell(before, column, row, picture[row, column].tolist())
            token = int(assignment[row * SIDE + column])
            color = tokens[token].clamp(0, 1).tolist()
            cell(after, column, row, color, edgecolor=color if sizes[token] > 1 else "white")
    for top in range(0, SIDE, WINDOW):
        for left in range(0, SIDE, WINDOW):
            u = unit[top : top + WINDOW, left : left + WINDOW].reshape(-1, 3)
            n = len(u)
            similarity = float((u.sum(0).square().sum() - u.square().sum()) / (n * (n - 1)))
            merges = similarity >= THRESHOLD
            for ax in (before, after) if merges else (before,):
                cell(ax, left, top, "none", WINDOW, edgecolor=LINE if merges else INK, linewidth=2.5 if merges else 0.8)
            label = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
            where = (left + WINDOW / 2, top + WINDOW / 2)
            before.text(*where, f"{similarity:.2f}", ha="center", va="center", fontsize=9, color=INK, bbox=label)
    for ax in (before, after):
        ax.set(xlim=(-0.1, SIDE + 0.1), ylim=(SIDE + 0.1, -0.1))
    return drawn


def select() -> Figure:
    """Stage 2: the plane of shares and peaks."""
    generator = torch.Generator().manual_seed(5)
    count, rows, share, least_peak = 90, 12, 0.008, 0.03
    total = torch.randn(1, count, generator=generator).exp()
    total *= rows / total.sum()  # the attention of each text row sums to 1
    peak = total * torch.rand(1, count, generator=generator).mul(torch.tensor(float(rows)).log()).neg().exp()
    protected = torch.rand(1, count, generator=generator) < 0.1
    types = torch.full((1, count), int(mk.TokenType.VISION), dtype=torch.uint8)
    kept = mk.select_dual(total, peak, types, share, least_peak, protected=protected)
    stays = torch.zeros(count, dtype=torch.bool)
    stays[kept.keep[0, : int(kept.counts)]] = True
    drawn = Figure(figsize=(6, 4.1), layout="constrained")
    ax = drawn.subplots()
    x, y, key = (total / total.sum())[0], peak[0], protected[0]
    for mask, style in (
        (~stays, {"color": "#b3b9c4", "label": f"goes: {int((~stays).sum())}"}),
        (stays & ~key, {"color": VISION, "edgecolor": TEXT, "label": f"stays: {int((stays & ~key).sum())}"}),
        (key, {"color": KEY, "edgecolor": INK, "marker": "D", "label": f"key token, stays: {int(key.sum())}"}),
    ):
        ax.scatter(x[mask], y[mask], s=26, linewidths=0.7, zorder=3, **style)
    ax.set(xscale="log", yscale="log", xlabel="share: total / sum of totals", ylabel="peak")
    (left, _), (bottom, _) = ax.get_xlim(), ax.get_ylim()
    ax.fill_between([left, share], bottom, least_peak, color=GONE, zorder=0)
    ax.axvline(share, color=SOFT, linewidth=1, linestyle="--")
    ax.axhline(least_peak, color=SOFT, linewidth=1, linestyle="--")
    ax.text(share, ax.get_ylim()[1], " a", va="top", color=SOFT)
    ax.text(ax.get_xlim()[1], least_peak, "b ", ha="right", va="bottom", color=SOFT)
    ax.set(xlim=(left, None), ylim=(bottom, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    return drawn


def compact() -> Figure:
    """Stage 3: the caches of some layers, before and after."""
    text, vision, behind = 3, 14, 4
    length = text + vision + behind
    token = torch.arange(length)
    is_vision = (token >= text) & (token < text + vision)
    alive = ~is_vision | torch.isin(token, torch.tensor([4, 5, 9, 13]))  # after the last pruning layer
    halfway = alive | (token < 11)  # an earlier one dropped less
    written = [token, token, token[halfway], token[alive]]
    drawn, (before, after) = figure(2, 9, 2.3)
    for ax, title in ((before, "before: what each layer wrote"), (after, "after compact_kv_")):
        ax.set_title(title, color=INK, fontsize=10)
        ax.set(xlim=(-3.4, length + 0.1), ylim=(len(written) + 0.1, -0.1))
    for layer, tokens in enumerate(written):
        cache = tokens.float().view(1, 1, -1, 1).clone()
        slots = torch.nonzero(alive[tokens]).flatten()[None]
        counts = torch.tensor([slots.shape[1]], dtype=torch.int32)
        mk.compact_kv_([cache], [cache.clone()], [slots], [counts])
        for ax, held in ((before, tokens), (after, cache.flatten()[: int(counts)].long())):
            ax.text(-0.4, layer + 0.55, f"layer {layer}", ha="right", va="center", fontsize=9, color=SOFT)
            for slot in range(length):
                cell(ax, slot, layer, "none", edgecolor=GONE)
            for slot, name in enumerate(held.tolist()):
                cell(ax, slot, layer, (VISION if alive[name] else GONE) if is_vision[name] else TEXT)
    names = {"text": TEXT, "vision, in use": VISION, "vision, dropped by a later layer": GONE}
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in names.values()]
    drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawn


def main(folder: Path) -> None:
    """Write all figures."""
    mpl.rcParams |= {"svg.hashsalt": "mustdrop", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (merge, select, compact):
        draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "method")
