# SPDX-License-Identifier: Apache-2.0
"""Made pictures and questions: the same every time, right, and of disjoint splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from mustdrop_kernels.evaluation import pictures, questions


def test_a_picture_depends_on_its_number_alone() -> None:
    first = pictures.scene("test", 3, 7)
    pictures.scene("test", 3, 8)
    again = pictures.scene("test", 3, 7)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.boxes == again.boxes
    for other in (pictures.scene("test", 4, 7), pictures.scene("test", 3, 8), pictures.scene("validation", 3, 7)):
        assert not np.array_equal(first.pixels, other.pixels)


def test_splits_share_neither_digits_nor_photographs() -> None:
    for a, b in itertools.combinations(pictures.SPLITS, 2):
        assert not set(pictures._PHOTOGRAPHS[a]) & set(pictures._PHOTOGRAPHS[b])
        for digit in range(10):
            mine, theirs = ({image.tobytes() for image in pictures._glyphs(split)[digit]} for split in (a, b))
            assert mine
            assert not mine & theirs
    sizes = {split: sum(map(len, pictures._glyphs(split))) for split in pictures.SPLITS}
    assert sizes == {"train": 1257, "validation": 180, "test": 360}


def test_boxes_are_in_their_cells_and_painted() -> None:
    for index in range(20):
        seen = pictures.scene("test", 0, index)
        assert pictures.BOXES[0] <= len(seen.boxes) <= pictures.BOXES[1]
        assert len({(box.row, box.column) for box in seen.boxes}) == len(seen.boxes)
        for box in seen.boxes:
            assert box.row * 84 <= box.y <= box.y + box.size <= box.row * 84 + 84
            assert box.column * 84 <= box.x <= box.x + box.size <= box.column * 84 + 84
            corner = seen.pixels[box.y, box.x].astype(int)
            assert np.abs(corner - pictures.COLOURS[box.colour]).max() <= 16


def test_coverage_adds_up_to_the_box() -> None:
    box = pictures.scene("train", 0, 0).boxes[0]
    assert box.coverage().sum() * pictures.PATCH**2 == pytest.approx(box.size**2)
    assert set(box.patches()) == set(np.flatnonzero(box.coverage().reshape(-1)))


def right_answer(seen: pictures.Scene, text: str) -> str:
    """Read from the boxes by the words of the question, in another way than the question was made."""
    words = text.replace("?", "").replace(",", "").split()
    places = {(questions.PLACES[b.row], questions.PLACES[b.column]): b for b in seen.boxes}
    if words[0] == "Is":
        return "yes" if words[3] in {box.colour for box in seen.boxes} else "no"
    if "row" in words:
        return getattr(places[words[words.index("row") + 1], words[-1]], words[1])
    if "right" in words:
        (left,) = [box for box in seen.boxes if box.colour == words[-2]]
        (found,) = [box for box in seen.boxes if (box.row, box.column) == (left.row, left.column + 1)]
        return found.digit
    if words[1] == "colour":
        (found,) = [box for box in seen.boxes if box.digit == words[-1]]
        return found.colour
    (found,) = [box for box in seen.boxes if box.colour == words[-2]]
    return found.digit


def test_answers_are_right_and_kinds_take_turns() -> None:
    asked = questions.items("test", 5, 60)
    for number, item in enumerate(asked):
        assert item.question.kind == list(questions.KINDS)[number % len(questions.KINDS)]
        assert right_answer(item.scene(), item.question.text) == item.question.answer
    assert asked == questions.items("test", 5, 60)
    assert asked[:10] == questions.items("test", 5, 10)
    assert {item.question.answer for item in asked if item.question.kind == "presence"} == {"yes", "no"}


def test_the_vocabulary_covers_the_questions() -> None:
    for item in questions.items("train", 0, 60):
        text = f"{item.question.text} {item.question.answer}".lower()
        assert set(text.replace("?", " ?").replace(",", " ,").split()) <= set(questions.WORDS)
        assert item.question.key in text
