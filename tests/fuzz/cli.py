# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``: every operator, and drop_tokens, on every available backend; a progress bar, a record."""

from __future__ import annotations

import json as json_module
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import hypothesis
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mustdrop_kernels.bench.machine import describe
from mustdrop_kernels.files import write_text

from .families import FAMILIES
from .runners import Here, available, child, closing
from .search import REGRESSIONS, Tally, search

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Ops = Annotated[str, typer.Option(help="Comma-separated names. Default: all.")]
Cases = Annotated[int, typer.Option(min=1, help="Cases per operator.")]
Minutes = Annotated[float, typer.Option(help="Time limit.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same cases. Default: random.")]
Backends = Annotated[
    str, typer.Option(help="Comma-separated NAME or NAME=SHARE of the cases. Default: all that are available.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write a record of the run here.")]
Save = Annotated[Path, typer.Option(help="Folder for shrunk failures.")]
Fast = Annotated[bool, typer.Option("--fast", help="Run cpu and reference in this process: a crash ends the run.")]
Jobs = Annotated[int, typer.Option(min=1, help="Operators in parallel, each with its own processes.")]


@app.command()
def fuzz(
    ops: Ops = "",
    cases: Cases = 1000,
    minutes: Minutes = 60.0,
    seed: Seed = None,
    backends: Backends = "",
    json: Json = None,
    save: Save = REGRESSIONS,
    jobs: Jobs = 1,
    fast: Fast = False,
) -> None:
    """Generate cases, compare all backends with the oracle and with each other, shrink and save failures.

    Exits with status 1 on a mismatch.
    """
    console = Console()
    try:
        wanted = _ops(ops)
        shares, missing = _shares(backends)
    except ValueError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    drawn = int.from_bytes(os.urandom(3), "big") if seed is None else seed
    for name, reason in missing.items():
        console.print(f"{name} is not available: {reason}", style="dim", markup=False, highlight=False)
    begin = time.monotonic()
    tallies = _run(wanted, shares, cases, drawn, begin + 60 * minutes, jobs, fast)
    console.print(_table(tallies))
    failures = [failure for tally in tallies for failure in tally.failures]
    for failure in failures:
        path = failure.save(save)
        console.print(f"{path}\n  {failure.message}", markup=False, highlight=False)
    if json is not None:
        write_text(json, json_module.dumps(_record(tallies, shares, missing, drawn, begin), indent=1) + "\n")
    console.print(f"seed {drawn}")
    raise typer.Exit(1 if failures else 0)


def _ops(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"there is no operator {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    return names


def _shares(text: str) -> tuple[dict[str, float | None], dict[str, str]]:
    """Backends under test with their shares (None: the default), and the unavailable ones with the reason."""
    there = available()
    missing = {name: reason for name, reason in there.items() if reason is not None}
    if not text:
        return {name: None for name in there if name not in missing}, missing
    shares: dict[str, float | None] = {}
    for entry in text.split(","):
        name, _, share = entry.strip().partition("=")
        if name not in there:
            raise ValueError(f"there is no backend {name!r}; there are {', '.join(there)}")
        if name in missing:
            raise ValueError(f"{name} is not available: {missing[name]}")
        shares[name] = float(share) if share else None
    return shares, {}


def _search(
    op: str, shares: dict[str, float | None], cases: int, seed: int, seconds: float, told: Any, fast: bool
) -> Tally:
    """Fuzz one operator, in a separate process if several run in parallel."""
    torch.set_num_threads(1)
    here = ("cpu", "reference") if fast else ()
    chosen = [Here(n, 1.0 if s is None else s) if n in here else child(n, s) for n, s in shares.items()]
    with closing(chosen) as runners:
        until = time.monotonic() + seconds
        return search(FAMILIES[op], runners, cases, seed, until=until, tell=lambda tally: told.put((op, tally.cases)))


def _run(
    ops: list[str], shares: dict[str, float | None], cases: int, seed: int, until: float, jobs: int, fast: bool
) -> list[Tally]:
    columns = (TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    found: dict[str, Tally] = {}
    with (
        context.Manager() as manager,
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        told = manager.Queue()
        tasks = {op: progress.add_task(op, total=cases, start=False) for op in ops}
        # The remaining time is divided among the remaining operators, ``jobs`` at a time.
        waiting, running = list(ops), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                op = waiting.pop(0)
                seconds = max(0.0, until - time.monotonic()) * jobs / (len(waiting) + jobs)
                running[pool.submit(_search, op, shares, cases, seed, seconds, told, fast)] = op
                progress.start_task(tasks[op])
            while not told.empty():
                op, done = told.get()
                progress.update(tasks[op], completed=done)
            for future in [f for f in running if f.done()]:
                op = running.pop(future)
                found[op] = future.result()
                progress.update(tasks[op], completed=found[op].cases)
                progress.stop_task(tasks[op])
            time.sleep(0.2)
    return [found[op] for op in ops]


def _table(tallies: list[Tally]) -> Table:
    table = Table(title="Every case is compared with the oracle")
    for column in ("operator", "cases", "near a threshold", "mismatches", "s", "computed by"):
        table.add_column(column, justify="left" if column in ("operator", "computed by") else "right")
    for tally in tallies:
        near = max(tally.near.values(), default=0)
        who = ", ".join(f"{name} {number}" for name, number in tally.by_runner.items())
        row = [tally.op, str(tally.cases), str(near), str(len(tally.failures)), f"{tally.seconds:.0f}", who]
        table.add_row(*row, style="red" if tally.failures else None)
    return table


def _record(
    tallies: list[Tally], shares: dict[str, float | None], missing: dict[str, str], seed: int, begin: float
) -> dict[str, Any]:
    """Configuration, machine and results of the run in plain JSON types."""
    total: Counter[str] = sum((tally.by_runner for tally in tallies), Counter())
    return {
        "command": " ".join(["python -m tests.fuzz", *sys.argv[1:]]),
        "seed": seed,
        "machine": describe(torch.device("cpu"), 1),
        "hypothesis": hypothesis.__version__,
        "transformers": transformers.__version__,
        "runners": {name: {"cases": total[name]} for name in shares},
        "not_playing": missing,
        "seconds": round(time.monotonic() - begin, 1),
        "cases": sum(tally.cases for tally in tallies),
        "mismatches": sum(len(tally.failures) for tally in tallies),
        "ops": {tally.op: tally.to_dict() for tally in tallies},
    }
