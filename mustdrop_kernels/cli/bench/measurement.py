# SPDX-License-Identifier: Apache-2.0
"""Course of a sub-command of ``mustdrop bench``: print the plan, or load or measure a document, and show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ...bench.documents import Document, Keep, Sheet, Tell, command_line, write
from ...errors import Refusal
from ..options import refusals, refuse
from ..progress import bar, sigterm_interrupts


def carry_out(
    *,
    plan: Callable[[], Iterable[str]],
    run: Callable[[Tell, Keep], Document],
    read: Callable[[Path], Document],
    json: Path | None,
    load: Path | None,
    dry_run: bool,
) -> Document | None:
    """Print the plan, or load or measure the document, and write it; None after a dry run.

    An interrupt (Ctrl-C, SIGTERM) that leaves nothing to show ends the command with status 130.
    """
    if dry_run:
        console = Console()
        with refusals():
            for line in plan():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return None

    def keep(unfinished: Document) -> None:
        if json is not None:
            write(unfinished, json)

    if load is not None:
        with refusals():
            document = read(load)
    else:
        try:
            with bar() as tell, sigterm_interrupts():
                document = run(tell, keep)
        except Refusal as refusal:
            refuse(str(refusal))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        if document.get("stopped") and not document["rows"]:
            raise typer.Exit(130)  # nothing is finished: an older document stays
    keep(document)
    return document


def show_sheet(sheet: Sheet, title: str, markdown: bool) -> None:
    """Print a table and its note."""
    console = Console()
    if markdown:
        console.print(sheet.markdown(), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(sheet.table(title))
    console.print(sheet.note, style="dim", markup=False, highlight=False)


def measure_sheet(
    module: Any, options: Any, title: str, *, json: Path | None, load: Path | None, dry_run: bool, markdown: bool
) -> None:
    """Carry out a measurement of ``mustdrop_kernels.bench`` and print its sheet."""
    document = carry_out(
        plan=lambda: module.plan_lines(options),
        run=lambda tell, keep: module.run(options, command_line(), tell),
        read=module.read, json=json, load=load, dry_run=dry_run,
    )  # fmt: skip
    if document is not None:
        show_sheet(module.sheet(document), title, markdown)
