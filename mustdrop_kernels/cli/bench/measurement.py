# SPDX-License-Identifier: Apache-2.0
"""Common options of the sub-commands of ``mustdrop bench``, and their implementation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console

from ...bench.documents import Document, Keep, Sheet, Tell, command_line, write
from ...errors import Refusal
from ..progress import bar, sigterm_interrupts

Json = Annotated[Path | None, typer.Option("--json", help="Write the document to this file.")]
Load = Annotated[Path | None, typer.Option(help="Show this document instead of measuring anything.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table instead of tables for a console.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be measured, its memory and its time.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: torch's.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Context in which invalid options and missing packages end the command with one sentence and status 2."""
    try:
        yield
    except ImportError as error:
        refuse(f"{error}; pip install 'mustdrop_kernels[transformers,triton]' has what the models and kernels need")
    except typer.Exit:  # a RuntimeError
        raise
    except (Refusal, ValueError, OSError, RuntimeError) as error:
        refuse(str(error))


def refuse(reason: str) -> NoReturn:
    """End the command with status 2."""
    print(f"mustdrop: {reason}", file=sys.stderr)
    raise typer.Exit(2) from None


def check_device(device: str, used: bool = True) -> None:
    """Raise ``ValueError`` for an unknown device, or for an absent one that is to be used."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if used and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")


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
