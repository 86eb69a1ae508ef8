# SPDX-License-Identifier: Apache-2.0
"""Summary of a document of ``mustdrop eval``: accuracy, intervals, differences; as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.documents import Sheet
from ..flops import LanguageModel, account
from ..report.plots import panels, save
from . import FULL
from .scoring import f1, interval, paired

if TYPE_CHECKING:
    from rich.table import Table

    from .results import Document

Cell = dict[str, Any]
Row = dict[str, Any]


def kinds(document: Document) -> list[str]:
    """Names in the order of the document."""
    return list(dict.fromkeys(document["kinds"]))


def late(document: Document) -> list[str]:
    """Kinds of question that need vision tokens beyond a third of the layers.

    These lose more than half of their accuracy above chance when all vision tokens are dropped after a quarter of the
    layers; all kinds if that has not been measured.
    """
    everything = kinds(document)
    full = _find(document, FULL, None)
    depth = len(full["processed"]) if full and full["processed"] else 0
    early = _find(document, f"after-{max(0, depth // 4 - 1)}", None)
    if full is None or early is None or not early["right"]:
        return everything
    blind = _find(document, "after-0", None) or early
    found = []
    for kind in everything:
        whole, part, none = (_mean(_of(document, cell, [kind])) for cell in (full, early, blind))
        if part < whole - 0.5 * (whole - min(none, part)) and whole - part > 0.05:
            found.append(kind)
    return found or everything


def rows(document: Document, only: Sequence[str] | None = None) -> list[Row]:
    """A row for each cell with answers.

    Args:
        document: of ``mustdrop eval``.
        only: kinds of question; by default all.
    """
    model = LanguageModel(**document["about"]["sizes"])
    found = []
    for cell in document["cells"]:
        right = _of(document, cell, only)
        if not right:
            continue
        processed = [round(n) for n in cell["processed"]]
        cost = account(model, processed, text=round(cell["text"]))
        row = {
            "method": cell["method"], "budget": cell["budget"], "questions": len(right), "accuracy": _mean(right),
            "interval": interval(right), "tokens": _mean(cell["tokens"]), "last": _mean(cell["last"]),
            "kv_bytes": _mean(cell["kv_bytes"]), "flops": cost.flops, "saved": cost.saved,
            "ms": 1000 * cell["seconds"] / len(cell["right"]),
            "by_kind": {kind: _mean(_of(document, cell, [kind])) for kind in kinds(document)},
        }  # fmt: skip
        if document["truth"]:
            row |= f1(cell["right"], document["truth"][: len(cell["right"])])
        found.append(row)
    return found


def differences(document: Document, ours: str, only: Sequence[str] | None = None) -> list[Row]:
    """Paired differences between one method and the others at equal budgets."""
    found = []
    for cell in document["cells"]:
        mine = _find(document, ours, cell["budget"])
        if cell["budget"] is None or cell["method"] == ours or mine is None:
            continue
        pairs = list(zip(_of(document, mine, only), _of(document, cell, only), strict=False))
        if pairs:
            mean, low, high = paired([a for a, _ in pairs], [b for _, b in pairs])
            found.append({"method": cell["method"], "budget": cell["budget"], "questions": len(pairs),
                          "difference": mean, "interval": (low, high)})  # fmt: skip
    return found


def notes(document: Document) -> list[str]:
    """The machine, and unreachable settings with their reasons."""
    machine, about = document["machine"], document["about"]
    lines = [
        f"{about['questions']}, {len(document['kinds'])} questions, model {about['model']} in {about['dtype']}; "
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, mustdrop_kernels "
        f"{machine['mustdrop_kernels']}" + (f" at {machine['commit']}" if machine["commit"] else ""),
    ]
    reasons = [(cell["method"], cell["budget"], cell["why_not"]) for cell in document["cells"] if cell["why_not"]]
    lines += [f"{method} at {budget:g}: not reached: {reason}" for method, budget, reason in reasons]
    return lines


def _find(document: Document, method: str, budget: float | None) -> Cell | None:
    there = (cell for cell in document["cells"] if (cell["method"], cell["budget"]) == (method, budget))
    return next(there, None)


def _of(document: Document, cell: Cell, only: Sequence[str] | None) -> list[float]:
    return [r for r, kind in zip(cell["right"], document["kinds"], strict=False) if only is None or kind in only]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---------------------------------------------------------------------------------------------------------- tables


def tables(document: Document, ours: str) -> Iterable[Table]:
    """Tables for a terminal."""
    for sheet in _sheets(document, ours):
        yield sheet.table(sheet.note, title_justify="left", caption_justify="left")


def markdown(document: Document, ours: str, part: str | None = None) -> str:
    """Tables in Markdown.

    Args:
        document: of ``mustdrop eval``.
        ours: the method that the others are compared with.
        part: beginning of a table's title, to print that table only.
    """
    sheets = _sheets(document, ours)
    return "\n\n".join(sheet.markdown() for sheet in sheets if sheet.note.lower().startswith((part or "").lower()))


def _sheets(document: Document, ours: str) -> Iterable[Sheet]:
    """Tables; their notes are their titles."""
    yield from _after_sheet(document)
    everything = late(document)
    names = kinds(document)
    if len(everything) < len(names):
        yield from _budget_sheet(document, everything, f"Read late ({', '.join(everything)})")
    yield from _budget_sheet(document, None, "All questions")
    yield from _difference_sheet(document, ours, everything)
    yield from _preset_sheet(document)
    yield _cost_sheet(document)


def _after_sheet(document: Document) -> Iterable[Sheet]:
    found = [row for row in rows(document) if row["method"].startswith("after-")]
    if not found:
        return
    names = kinds(document)
    full = [row for row in rows(document) if row["method"] == FULL]
    lines = [
        [row["method"].replace("after-", "after layer ").replace(FULL, "never"),
         *(_percent(row["by_kind"][kind]) for kind in names), _percent(row["accuracy"])]
        for row in [*sorted(found, key=lambda row: int(row["method"].split("-")[1])), *full]
    ]  # fmt: skip
    title = f"Dropping all vision tokens at once: right answers of {found[0]['questions']} questions"
    yield Sheet(["vision tokens go", *names, "all"], lines, title)


def _budget_sheet(document: Document, only: Sequence[str] | None, title: str) -> Iterable[Sheet]:
    found = rows(document, only)
    compared = [c for c in document["cells"] if c["budget"] is not None and (c["right"] or c["why_not"])]
    budgets = sorted({cell["budget"] for cell in compared}, reverse=True)
    full = next((row for row in found if row["method"] == FULL), None)
    if not budgets:
        return
    at = {(row["method"], row["budget"]): row for row in found}
    missing = {(cell["method"], cell["budget"]) for cell in document["cells"] if cell["why_not"]}
    lines = []
    for method in dict.fromkeys(cell["method"] for cell in compared):
        shown = [at.get((method, budget)) for budget in budgets]
        lines.append([
            f"`{method}`",
            *(_with_interval(row) if row else "not reached" if (method, budget) in missing else ""
              for row, budget in zip(shown, budgets, strict=True)),
        ])  # fmt: skip
    if full:
        title += f": right answers, all 576 tokens {_with_interval(full)}"
    count = max(row["questions"] for row in found)
    columns = ["vision tokens, mean over layers", *(f"{budget:g}" for budget in budgets)]
    yield Sheet(columns, lines, f"{title}; {count} questions, 95% intervals")


def _difference_sheet(document: Document, ours: str, only: Sequence[str]) -> Iterable[Sheet]:
    whole = differences(document, ours)
    part = {(row["method"], row["budget"]): row for row in differences(document, ours, only)}
    if not whole:
        return
    budgets = sorted({row["budget"] for row in whole}, reverse=True)
    at = {(row["method"], row["budget"]): row for row in whole}
    lines = []
    parts = {"": at} if len(only) == len(kinds(document)) else {", read late": part, ", all": at}
    for method in dict.fromkeys(row["method"] for row in whole):
        cells = [f"`{method}`"]
        for budget in budgets:
            for source in parts.values():
                row = source.get((method, budget))
                cells.append("" if row is None else _signed(row))
        lines.append(cells)
    headings = [f"{budget:g}{what}" for budget in budgets for what in parts]
    yield Sheet(["against", *headings], lines, f"Points by which `{ours}` is ahead, paired, 95% intervals")


def _preset_sheet(document: Document) -> Iterable[Sheet]:
    found = [row for row in rows(document) if row["method"].startswith("preset-")]
    if found:
        lines = [[f"`{row['method'].removeprefix('preset-')}`", _with_interval(row), *_costs(row)] for row in found]
        yield Sheet(["preset", "right", *_COSTS], lines, "Presets as they are, their layers at this model's depth")


_COSTS = ["tokens, mean", "at the end", "KV cache", "operations saved"]


def _costs(row: Row) -> list[str]:
    return [f"{row['tokens']:.1f}", f"{row['last']:.1f}", f"{row['kv_bytes'] / 1e6:.2f} MB", f"{row['saved']:.1%}"]


def _cost_sheet(document: Document) -> Sheet:
    lines = []
    for row in rows(document):
        if row["method"].startswith("after-"):
            continue
        budget = "" if row["budget"] is None else f"{row['budget']:g}"
        lines.append([f"`{row['method']}`", budget, _percent(row["accuracy"]), *_costs(row), f"{row['ms']:.0f} ms"])
    return Sheet(["method", "budget", "right", *_COSTS, "time"], lines, "What it costs, a question")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _with_interval(row: Row) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _signed(row: Row) -> str:
    low, high = row["interval"]
    sure = "**" if low > 0 or high < 0 else ""
    return f"{sure}{100 * row['difference']:+.1f}{sure} ({100 * low:+.1f} to {100 * high:+.1f})"


# --------------------------------------------------------------------------------------------------------- picture


def draw(document: Document, path: Path, ours: str) -> None:
    """Accuracy over tokens, a line per method; on the left the kinds of ``late``."""
    parts = {"read late": late(document), "all questions": kinds(document)}
    if len(parts["read late"]) == len(parts["all questions"]):
        del parts["read late"]
    figure, (axes,) = panels(len(parts), 6.4 * len(parts) + 2.2, 4.8, sharey=True)
    for axis, (title, only) in zip(axes, parts.items(), strict=True):
        found = rows(document, only)
        methods = dict.fromkeys(row["method"] for row in found if row["budget"] is not None)
        others = [method for method in methods if method != ours]
        colors = {ours: "black"} | {method: f"C{number % 10}" for number, method in enumerate(others)}
        for method in methods:
            line = sorted((row for row in found if row["method"] == method), key=lambda row: row["tokens"])
            x, y = [row["tokens"] for row in line], [100 * row["accuracy"] for row in line]
            low = [100 * (row["accuracy"] - row["interval"][0]) for row in line]
            high = [100 * (row["interval"][1] - row["accuracy"]) for row in line]
            mine = method.startswith("mustdrop")
            axis.errorbar(
                x, y, [low, high], marker="o", ms=4, capsize=2, lw=2.4 if mine else 1.2, elinewidth=0.7,
                ls="-" if mine else "--", label=method, color=colors[method], zorder=3 if mine else 2,
            )  # fmt: skip
        for row in found:
            if row["method"] == FULL:
                axis.axhline(100 * row["accuracy"], color="0.4", lw=1, ls=":", label="all 576 tokens")
        axis.set_xscale("log", base=2)
        ticks = sorted({row["budget"] for row in found if row["budget"]})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlabel("vision tokens, mean over the layers")
        axis.set_title(title + ("" if len(only) == len(kinds(document)) else f": {', '.join(only)}"), fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, %")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path, dpi=110)
