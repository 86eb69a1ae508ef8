# SPDX-License-Identifier: Apache-2.0
"""Document of ``mustdrop bench ops`` as tables and Markdown, and compared with an older one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_document
from .documents import Sheet
from .run import FORMAT, FORMER_FORMAT, Document, Options, Row, candidates, count_of_copies, plan
from .units import duration, factor, size

if TYPE_CHECKING:
    from rich.table import Table


def read(path: Path) -> Document:
    """Read a document.

    Raises:
        ValueError: the file is something else.
    """
    document = read_document(path, (FORMAT, FORMER_FORMAT), "mustdrop bench ops")
    return document if document["format"] == FORMAT else _renamed(document)


def _renamed(document: Document) -> Document:
    """A document of the former format, converted to this one."""
    rows = [
        {"candidate" if name == "contender" else name: value for name, value in row.items()} for row in document["rows"]
    ]
    for row in rows:
        row["kind"] = "baseline" if row["kind"] == "peer" else row["kind"]
    return {**document, "format": FORMAT, "rows": rows}


def only(document: Document, ops: Collection[str] | None) -> Document:
    """The document with the rows of these operators; with all rows where none is named."""
    return {**document, "rows": [row for row in document["rows"] if not ops or row["op"] in ops]}


def key(row: Row) -> tuple[str, ...]:
    """Subject of a row, without its candidate."""
    return row["op"], row["shape"], row["dtype"], row["device"]


def _spread(row: Row) -> str:
    """Half the distance between the quartiles, in percent of the median."""
    return f"±{100 * (row['q3_us'] - row['q1_us']) / 2 / row['median_us']:.0f}%"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.1f}%" if value else ""


def cells(row: Row) -> list[str]:
    """A timed row's figures as text, under ``HEADINGS``."""
    ratio = row.get("ratio")
    return [
        f"{duration(row['median_us'])} {_spread(row):>4}",
        _percent(row["copy_fraction"]),
        _percent(row["matrix_fraction"]),
        size(row["peak_extra_bytes"]),
        "" if row["host_us"] is None else duration(row["host_us"]),
        row["how"],
        factor(ratio["median"]) if ratio is not None else "",
    ]


HEADINGS = ("time", "copy", "matrix", "memory", "host", "how", "ratio")
ON_GPU_ALONE = ("host", "how")


def tables(document: Document) -> Iterator[Table]:
    """One for each shape and dtype; no wider than 80 columns, but for a GPU."""
    from rich import box
    from rich.table import Table

    gpu = document["machine"]["device"] == "cuda"
    by_shape = sorted(document["rows"], key=lambda row: (row["shape"], row["dtype"]))
    for (shape, dtype), rows in groupby(by_shape, key=lambda row: (row["shape"], row["dtype"])):
        table = Table(title=f"{shape}, {dtype}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("computed by")
        for name in HEADINGS:
            if gpu or name not in ON_GPU_ALONE:
                table.add_column(name, justify="right", no_wrap=True)
        for op, group in groupby(rows, key=lambda row: row["op"]):
            table.add_row(f"[bold underline]{op}[/]")
            for row in group:
                if row["status"] != "skipped":  # the notes say why
                    table.add_row(*_line(row, gpu))
            table.add_section()
        yield table


def _line(row: Row, gpu: bool) -> list[str]:
    name = f"  [bold]{row['candidate']}[/]" if row["kind"] == "backend" else f"  {row['candidate']}"
    if row["status"] == "wrong":
        return [name, "[red]wrong[/]"]
    shown = zip(cells(row), HEADINGS, strict=True)
    return [name, *(text for text, heading in shown if gpu or heading not in ON_GPU_ALONE)]


def notes(document: Document) -> list[str]:
    """Notes below the tables: the machine, what was not timed and why, and how to read the figures."""
    machine = document["machine"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine["matrix_rate"].items())
    lines = [
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"mustdrop_kernels {machine['mustdrop_kernels']}" + (f" at {machine['commit']}" if machine["commit"] else ""),
        f"measured here: copy {machine['copy_bandwidth'] / 1e9:.1f} GB/s, matrix product {rates}",
        "time: median, and half the distance between the quartiles. copy, matrix: the bytes that have to move and the "
        "FLOPs, over the time, as a part of these rates. memory: the peak of a call, results included. "
        "ratio: the time over that of the operator's first row, both from the same rounds.",
    ]
    load = machine.get("load")
    if load and load[0] > 1.5 * machine["threads"]:
        lines.append(f"the machine was busy with other things (load {load[0]:.1f}): do not trust these times")
    if document["quick"]:
        lines.append("quick: few rounds, no compiled baselines; not for comparisons")
    if document.get("stopped"):
        cases = document["cases"]
        lines.append(f"stopped after {cases['measured']} of {cases['planned']} cases: {document['stopped']}")
    remarks: dict[str, list[str]] = {}
    for row in document["rows"]:
        for remark in _remarks(row):
            where = remarks.setdefault(remark, [])
            if (about := f"{row['op']} {row['shape']} {row['dtype']}") not in where:
                where.append(about)
    for remark, where in remarks.items():
        lines.append(f"{remark} ({', '.join(where[:3])}{', ...' if len(where) > 3 else ''})")
    return lines


def _remarks(row: Row) -> Iterator[str]:
    """Remarks on a row. Documents of older versions lack some of the fields."""
    if row["status"] != "timed":
        yield f"{row['candidate']}: {row['status']}: {row['reason']}"
        return
    if row.get("detail"):
        yield f"{row['candidate']}: {row['detail']}"
    if row.get("why_eager"):
        yield f"{row['candidate']}: eager, with the gaps that its host leaves: {row['why_eager']}"
    if row.get("in_cache") and row["kind"] == "backend":
        yield "all copies of the inputs fit into the cache"


def comparison(old: Document, new: Document) -> Iterator[dict[str, Any]]:
    """Rows that both have: how many times as fast the new one is, and whether that is more than the spread."""
    timed = {(*key(row), row["candidate"]): row for row in old["rows"] if row["status"] == "timed"}
    for row in new["rows"]:
        before = timed.get((*key(row), row["candidate"]))
        if before is None or row["status"] != "timed":
            continue
        apart = before["q1_us"] > row["q3_us"] or before["q3_us"] < row["q1_us"]
        yield {
            **{name: row[name] for name in ("op", "shape", "dtype", "device", "candidate", "kind")},
            "old_us": before["median_us"],
            "new_us": row["median_us"],
            "speedup": before["median_us"] / row["median_us"],
            "apart": apart,
        }


def comparison_table(old: Document, new: Document) -> Table:
    """Old and new times side by side."""
    from rich.table import Table

    table = Table(title="against the older document", title_justify="left", title_style="bold")
    for name in ("case", "computed by"):
        table.add_column(name)
    for name in ("old", "new", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison(old, new):
        color = ("green" if row["speedup"] > 1 else "red") if row["apart"] else "dim"
        case = f"{row['op']} {row['shape']} {row['dtype']}"
        times = duration(row["old_us"]), duration(row["new_us"])
        table.add_row(case, row["candidate"], *times, f"[{color}]{factor(row['speedup'])}[/]")
    return table


def comparison_notes(old: Document, new: Document) -> list[str]:
    """Differences of the machines of two documents."""
    names = ("name", "threads", "torch", "torch_cpu_capability", "mustdrop_cpu_capability")
    lines = [
        f"{name}: {old['machine'].get(name)} then, {new['machine'].get(name)} now"
        for name in names
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    drift = new["machine"]["copy_bandwidth"] / old["machine"]["copy_bandwidth"]
    lines.append(f"the machine's copy bandwidth is {factor(drift)} what it was; dim: within the spread of the two")
    return lines


def plan_lines(options: Options) -> Iterator[str]:
    """Lines of a dry run: each case, what would be timed and why the rest would not; memory and time at the end."""
    largest, ways = 0, 0
    for case in plan(options):
        found, work = candidates(case, options, build=False), case.work
        flops = f", {work.flops / 1e9:.3g} GFLOP" if work.flops else ""
        yield (
            f"{case.label}: {case.shape.length} tokens, inputs {size(case.input_bytes)}, "
            f"at least {size(work.bytes)} moved{flops}"
        )
        for kind, title in (("backend", "ours"), ("baseline", "baselines"), ("context", "context")):
            names = [one.name for one in found if one.kind == kind and not one.why_not]
            ways += len(names)
            if names:
                yield f"  {title}: {'; '.join(names)}"
        yield from (f"  not timed: {one.name}: {one.why_not}" for one in found if one.why_not)
        largest = max(largest, case.input_bytes * count_of_copies(case, options.hot, options.quick))
    seconds = ways * options.effort.seconds
    yield f"inputs of up to {size(largest)} at a time; {ways} ways to time take about {duration(1e6 * seconds)}"


def markdown(document: Document) -> str:
    """The backends' rows with their ratios to every baseline, for a README, and what was measured where."""
    groups = []
    for _, group in groupby(document["rows"], key=key):
        timed = [row for row in group if row["status"] == "timed"]
        ours = next((row for row in timed if row["kind"] == "backend"), None)
        if ours is not None:
            groups.append((ours, [row for row in timed if row["kind"] == "baseline"]))
    columns = [name for name in ("shape", "dtype") if len({ours[name] for ours, _ in groups}) > 1]
    rows = []
    for ours, baselines in groups:
        ratios = ", ".join(
            f"{row['candidate']} {factor(row['ratio']['median'])}{' (eager)' if row['how'] == 'eager' else ''}"
            for row in baselines
        )
        time = f"{duration(ours['median_us'])} {_spread(ours)}"
        rows.append([f"`{ours['op']}`", *(ours[name] for name in columns), time, ratios])
    machine = document["machine"]
    where = [groups[0][0][name] for name in ("shape", "dtype") if name not in columns] if groups else []
    where += [machine["name"], f"{machine['threads']} threads" if machine["device"] == "cpu" else ""]
    where += [f"torch {machine['torch']}", "inputs in the cache" if document["hot"] else "inputs out of the cache"]
    about = f"{', '.join(filter(None, where))}; `{' '.join(document['command'])}`"
    headings = ["operator", *columns, "time", "how many times as long its baselines take"]
    return Sheet(headings, rows, about).markdown() + "\n"
