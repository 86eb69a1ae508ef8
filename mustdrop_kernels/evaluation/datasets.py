# SPDX-License-Identifier: Apache-2.0
"""Questions: generated, or from files in the formats of TextVQA, GQA and POPE."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from . import scoring
from .pictures import Split
from .questions import Item, items

SHORT = "\nAnswer the question using a single word or phrase."
"""Instruction that LLaVA-1.5's own evaluations append to a question."""


@dataclass(frozen=True)
class Example:
    """A question about a picture."""

    kind: str
    text: str
    answers: tuple[str, ...]
    picture: Callable[[], Image.Image]


@dataclass(frozen=True)
class Questions:
    """A data set: its examples and its scorer."""

    name: str
    examples: Sequence[Example]
    score: Callable[[str, Sequence[str]], float]
    yes_or_no: bool = False
    """True where F1 of "yes" is the score."""

    def scores(self, answers: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Score of each answer."""
        found = [self.score(text, example.answers) for text, example in zip(answers, examples, strict=True)]
        return [int(score) if score in (0.0, 1.0) else round(score, 4) for score in found]

    def head(self, count: int | None) -> Questions:
        """The first `count` questions; None: all."""
        return self if count is None else Questions(self.name, self.examples[:count], self.score, self.yes_or_no)


def made(split: Split, seeds: Sequence[int], count: int) -> Questions:
    """`count` questions about framed digits, with the seeds in turn."""
    each = -(-count // len(seeds))
    rows = [items(split, seed, each) for seed in seeds]
    in_turn = itertools.chain.from_iterable(zip(*rows, strict=True))
    examples = [_made(item) for item in in_turn]
    return Questions("digits", examples[:count], scoring.exact_match)


def _made(item: Item) -> Example:
    asked = item.question
    return Example(asked.kind, asked.text, (asked.answer,), lambda: item.scene().image)


def read(path: Path, images: Path | None = None) -> Questions:
    """Questions of a file, or of the only file with questions in a folder.

    Args:
        path: TextVQA's JSON ({"data": [...]}), GQA's ({question id: {...}}) or POPE's JSON lines.
        images: folder of the pictures, also in folders of it; by default the questions' folder.

    Raises:
        ValueError: no format fits, or a picture is not there.
    """
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    parsed = [(file, _parse(file)) for file in candidates if file.suffix in (".json", ".jsonl")]
    found = [(file, *both) for file, both in parsed if both is not None]
    if len(found) != 1:
        names = ", ".join(file.name for file, *_ in found) or "none"
        raise ValueError(f"{path}: one file in the format of TextVQA, GQA or POPE is wanted, found {names}")
    file, name, rows = found[0]
    where = _Pictures(images or file.parent)
    score = {"TextVQA": scoring.vqa_accuracy, "GQA": scoring.exact_match, "POPE": scoring.yes_no}[name]
    examples = [Example(kind, text + SHORT, answers, where.find(picture)) for kind, text, answers, picture in rows]
    return Questions(name, examples, score, yes_or_no=name == "POPE")


_Row = tuple[str, str, tuple[str, ...], str]


def _parse(file: Path) -> tuple[str, list[_Row]] | None:
    """The format's name and rows (kind, question, answers, picture's name); None if no format fits."""
    for name, rows in _FORMATS.items():
        try:
            found = list(rows(file.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if found:
            return name, found
    return None


def _textvqa(text: str) -> Iterator[_Row]:
    for row in json.loads(text)["data"]:
        yield "question", row["question"], tuple(row["answers"]), row["image_id"]


def _gqa(text: str) -> Iterator[_Row]:
    for row in json.loads(text).values():
        kind = (row.get("types") or {}).get("structural", "question")
        yield kind, row["question"], (row["answer"],), row["imageId"]


def _pope(text: str) -> Iterator[_Row]:
    for line in filter(str.strip, text.splitlines()):
        row: dict[str, Any] = json.loads(line)
        yield "presence", row["text"], (row["label"],), row["image"]


_FORMATS = {"TextVQA": _textvqa, "GQA": _gqa, "POPE": _pope}


class _Pictures:
    """Index of pictures by name, with or without the suffix."""

    def __init__(self, folder: Path):
        self.folder = folder
        endings = {".jpg", ".jpeg", ".png", ".webp"}
        files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in endings]
        self.files = {file.stem: file for file in files} | {file.name: file for file in files}

    def find(self, name: str) -> Callable[[], Image.Image]:
        """Function that opens the picture."""
        file = self.files.get(str(name))
        if file is None:
            raise ValueError(f"{self.folder} has no picture {name!r}")
        return lambda: Image.open(file).convert("RGB")
