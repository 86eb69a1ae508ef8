# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene. Every answer is one word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .pictures import CELLS, COLOURS, DIGITS, Box, Scene, Split, scene

PLACES = ("one", "two", "three", "four")
PROMPT = "USER: <image>\n{} ASSISTANT:"


@dataclass(frozen=True)
class Question:
    """A question about one scene, and its answer."""

    kind: str
    text: str
    answer: str
    key: str  # the last word that the question turns on
    boxes: tuple[int, ...]  # those that show the answer: without their patches it can only be guessed

    @property
    def prompt(self) -> str:
        """The prompt of a model."""
        return PROMPT.format(self.text)


Asked = Callable[[Scene, np.random.Generator], Question | None]


def _one(boxes: Sequence[Box], attribute: str, draw: np.random.Generator) -> int | None:
    """A box with a unique color or digit."""
    counts = Counter(getattr(box, attribute) for box in boxes)
    single = [i for i, box in enumerate(boxes) if counts[getattr(box, attribute)] == 1]
    return int(draw.choice(single)) if single else None


def _of_one(kind: str, text: str, named: str, asked: str) -> Asked:
    """A question about an attribute of the box that the text identifies by another attribute."""

    def ask(seen: Scene, draw: np.random.Generator) -> Question | None:
        i = _one(seen.boxes, named, draw)
        if i is None:
            return None
        key = getattr(seen.boxes[i], named)
        return Question(kind, text.format(key), getattr(seen.boxes[i], asked), key, (i,))

    return ask


def _at_place(what: str) -> Asked:
    def ask(seen: Scene, draw: np.random.Generator) -> Question | None:
        i = int(draw.integers(len(seen.boxes)))
        box = seen.boxes[i]
        row, column = PLACES[box.row], PLACES[box.column]
        text = f"Which {what} is in row {row}, column {column}?"
        return Question(f"{what} at place", text, getattr(box, what), column, (i,))

    return ask


def _right_of(seen: Scene, draw: np.random.Generator) -> Question | None:
    at = {(box.row, box.column): i for i, box in enumerate(seen.boxes)}
    counts = Counter(box.colour for box in seen.boxes)
    pairs = [
        (i, at[box.row, box.column + 1])
        for i, box in enumerate(seen.boxes)
        if counts[box.colour] == 1 and (box.row, box.column + 1) in at
    ]
    if not pairs:
        return None
    i, j = pairs[draw.integers(len(pairs))]
    text = f"Which digit is right of the {seen.boxes[i].colour} box?"
    return Question("digit right of colour", text, seen.boxes[j].digit, seen.boxes[i].colour, (i, j))


def _presence(seen: Scene, draw: np.random.Generator) -> Question | None:
    there = sorted({box.colour for box in seen.boxes})
    missing = sorted(set(COLOURS) - set(there))
    yes = not missing or draw.random() < 0.5
    colour = str(draw.choice(there if yes else missing))
    boxes = tuple(i for i, box in enumerate(seen.boxes) if box.colour == colour)
    return Question("presence", f"Is there a {colour} box?", "yes" if yes else "no", colour, boxes)


KINDS: dict[str, Asked] = {
    "digit in colour": _of_one("digit in colour", "Which digit is in the {} box?", "colour", "digit"),
    "colour of digit": _of_one("colour of digit", "Which colour is the box with the {}?", "digit", "colour"),
    "digit at place": _at_place("digit"),
    "colour at place": _at_place("colour"),
    "digit right of colour": _right_of,
    "presence": _presence,
}
CHANCE = {kind: 0.5 if kind == "presence" else 0.1 for kind in KINDS}
_COMMON = "user assistant which digit colour is in the box with row column right of there a yes no ? , :"
WORDS = tuple(dict.fromkeys([*_COMMON.split(), *DIGITS, *COLOURS]))  # their order is that of the tokenizer
assert len(PLACES) == CELLS


def ask(seen: Scene, kind: str, draw: np.random.Generator) -> Question | None:
    """A question of this kind; None if the scene has none."""
    return KINDS[kind](seen, draw)


@dataclass(frozen=True)
class Item:
    """A question together with its picture's number."""

    split: Split
    seed: int
    index: int
    question: Question

    def scene(self) -> Scene:
        """The picture, generated in each call."""
        return scene(self.split, self.seed, self.index)


def items(split: Split, seed: int, count: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Item]:
    """`count` questions, each about its own picture, kinds in turn."""
    found: list[Item] = []
    index = 0
    while len(found) < count:
        seen = scene(split, seed, index)
        question = ask(seen, kinds[len(found) % len(kinds)], np.random.default_rng((seed, index, 1)))
        if question is not None:
            found.append(Item(split, seed, index, question))
        index += 1
    return found
