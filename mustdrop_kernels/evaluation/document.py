# SPDX-License-Identifier: Apache-2.0
"""The JSON document of an evaluation: a cell for each method and budget, with an entry for each question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_document, write_text

if TYPE_CHECKING:
    from .datasets import Questions

FORMAT = "mustdrop-eval-1"
Document = dict[str, Any]


def start(description: dict[str, Any], questions: Questions, cells: Sequence[tuple[str, float | None]]) -> Document:
    """An empty document.

    Args:
        description: what it is about: model, questions, seeds. Documents that differ in it do not continue each other.
        questions: what is asked.
        cells: methods and budgets.
    """
    return {
        "format": FORMAT,
        "about": description,
        "kinds": [example.kind for example in questions.examples],
        "truth": [e.answers[0].lower() == "yes" for e in questions.examples] if questions.yes_or_no else None,
        "machine": {},
        "cells": [_cell(method, budget) for method, budget in cells],
    }


def _cell(method: str, budget: float | None) -> dict[str, Any]:
    return {"method": method, "budget": budget, "why_not": None, "right": [], "seconds": 0.0, "tokens": [], "last": [],
            "kv_bytes": [], "processed": None, "text": 0.0}  # fmt: skip


def read(path: Path) -> Document:
    """A document that ``write`` wrote.

    Raises:
        ValueError: it is something else.
    """
    return read_document(path, FORMAT, "mustdrop eval")


def write(document: Document, path: Path) -> None:
    """As JSON, a line a cell; a stop in between leaves the last one whole."""
    head = json.dumps({**document, "cells": None}, indent=1)
    cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in document["cells"])
    write_text(path, head.replace('"cells": null', f'"cells": [\n  {cells}\n ]') + "\n")


def resume(new: Document, path: Path) -> Document:
    """The document at `path` with the new one's cells added; the new one where there is none.

    Raises:
        ValueError: that document is about something else.
    """
    if not path.exists():
        return new
    old = read(path)
    if old["about"] != new["about"] or old["kinds"] != new["kinds"][: len(old["kinds"])]:
        raise ValueError(f"{path} is about other questions or another model: name another file")
    there = {(cell["method"], cell["budget"]): cell for cell in old["cells"]}
    asked = [(cell["method"], cell["budget"]) for cell in new["cells"]]
    cells = [there.pop(key, None) or _cell(*key) for key in asked]
    return {**old, "kinds": new["kinds"], "truth": new["truth"], "cells": [*cells, *there.values()]}
