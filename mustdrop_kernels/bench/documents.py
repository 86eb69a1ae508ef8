# SPDX-License-Identifier: Apache-2.0
"""Documents of measurements: JSON files, and tables of them for the console and for Markdown."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_document, write_text

if TYPE_CHECKING:
    from rich.table import Table

Document = dict[str, Any]
Tell = Callable[[str, float], None]
"""Takes the current step and the share of all steps that is done."""
Keep = Callable[[Document], None]
"""Takes an unfinished document."""


def command_line() -> list[str]:
    """The command line of this process, without the folder of its program."""
    program = sys.argv[0].rpartition("/")[2]
    return ["mustdrop" if program == "__main__.py" else program, *sys.argv[1:]]


def reader(kind: str | tuple[str, ...], maker: str) -> Callable[[Path], Document]:
    """Function that reads documents of a format, or of several; see ``read_document``."""
    return lambda path: read_document(path, kind, maker)


def write(document: Document, path: Path) -> None:
    """Write a document as JSON."""
    write_text(path, json.dumps(document, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of text, and a note on what was measured where."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def markdown(self) -> str:
        """The table and the note in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = ["| " + " | ".join(cells) + " |" for cells in lines]
        text[1] = text[1].replace(" ", "")
        return "\n".join([*text, "", f"*{self.note}*"])

    def table(self, title: str, **style: Any) -> Table:
        """The table for a console, without the note; `style` goes to rich's ``Table``."""
        from rich.table import Table

        table = Table(title=title, **style)
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def note(document: Document, *facts: str) -> str:
    """The note on a document: `facts`, the version of torch, the command."""
    command = document["command"]
    words = command if isinstance(command, str) else " ".join(command)
    return f"{', '.join(facts)}, torch {document['machine']['torch']}; `{words}`"
