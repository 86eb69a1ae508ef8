# SPDX-License-Identifier: Apache-2.0
"""The JSON document of an evaluation: a cell for each method and budget, with an entry for each question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_document, write_text
from . import FULL

if TYPE_CHECKING:
    from .datasets import Questions

FORMAT = "mustdrop-eval-1"
Document = dict[str, Any]
Key = tuple[str, float | None]
"""A cell's method and budget."""


def keys(methods: Sequence[str], budgets: Sequence[float]) -> list[Key]:
    """All combinations of methods and budgets; some methods take no budget."""
    found: list[Key] = []
    for name in methods:
        alone = name == FULL or name.startswith(("after-", "preset-"))
        found += [(name, None)] if alone else [(name, budget) for budget in budgets]
    return found


def start(description: dict[str, Any], questions: Questions, cells: Sequence[Key]) -> Document:
    """An empty document.

    Args:
        description: model, questions, seeds. A document continues only one with the same description.
        questions: of the data set.
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


def count(cell: dict[str, Any], processed: Sequence[float], *, last: float, kv_bytes: float, text: float) -> None:
    """Add the costs of a batch of questions to its cell: means over the batch's questions.

    Args:
        cell: of a document.
        processed: vision tokens in each layer.
        last: vision tokens after the last layer.
        kv_bytes: of the cache.
        text: other tokens.
    """
    before = len(cell["tokens"])
    cell["tokens"].append(round(sum(processed) / len(processed), 3))
    cell["last"].append(round(last, 3))
    cell["kv_bytes"].append(round(kv_bytes))
    old = cell["processed"] or [0.0] * len(processed)
    cell["processed"] = [round((a * before + b) / (before + 1), 3) for a, b in zip(old, processed, strict=True)]
    cell["text"] = round((cell["text"] * before + text) / (before + 1), 3)


def read(path: Path) -> Document:
    """Read a document.

    Raises:
        ValueError: the file is no such document.
    """
    return read_document(path, FORMAT, "mustdrop eval")


def write(document: Document, path: Path) -> None:
    """Write a document as JSON, one cell a line; an interrupt leaves the previous file intact."""
    head = json.dumps({**document, "cells": None}, indent=1)
    cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in document["cells"])
    write_text(path, head.replace('"cells": null', f'"cells": [\n  {cells}\n ]') + "\n")


def resume(new: Document, path: Path) -> Document:
    """The document at `path` with the cells of the new one added; the new one if there is none.

    Raises:
        ValueError: that document has another description.
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
