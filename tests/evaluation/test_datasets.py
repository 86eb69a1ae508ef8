# SPDX-License-Identifier: Apache-2.0
"""The file formats of TextVQA, GQA and POPE, and how each scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mustdrop_kernels.evaluation import datasets, scoring


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("0a1b.jpg", "n123.jpg", "COCO_val2014_000000000042.jpg"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "images" / name)
    return tmp_path


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_textvqa(folder: Path) -> None:
    people = ["nous les gosses"] * 6 + ["nous les"] * 2 + ["dakota", "clos"]
    row = {"question": "what does it say?", "image_id": "0a1b", "question_id": 34602, "answers": people}
    found = datasets.read(write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]}))
    assert found.name == "TextVQA"
    (example,) = found.examples
    assert example.text == "what does it say?" + datasets.SHORT
    assert example.picture().size == (8, 6)
    assert found.score("Nous les gosses.", example.answers) == 1.0
    # Of ten people two agree: leaving out one of them leaves 1/3, any of the other eight 2/3.
    assert found.score("nous les", example.answers) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert found.score("nothing", example.answers) == 0.0


def test_gqa(folder: Path) -> None:
    rows = {
        "201307251": {
            "imageId": "n123",
            "question": "Is it overcast?",
            "answer": "no",
            "types": {"structural": "verify"},
        }
    }
    found = datasets.read(write(folder / "testdev_balanced_questions.json", rows))
    assert (found.name, found.examples[0].kind) == ("GQA", "verify")
    assert [found.score(text, found.examples[0].answers) for text in ("No.", "no", "not", "yes")] == [1, 1, 0, 0]


def test_pope(folder: Path) -> None:
    image = "COCO_val2014_000000000042.jpg"
    rows = [
        {"question_id": i, "image": image, "text": "Is there a dog in the image?", "label": label}
        for i, label in enumerate(("yes", "no"))
    ]
    file = write(folder / "coco_pope_random.json", "\n".join(json.dumps(row) for row in rows) + "\n")
    found = datasets.read(file)
    assert found.name == "POPE"
    assert found.yes_or_no
    yes, no = (example.answers for example in found.examples)
    assert found.score("Yes, there is a dog.", yes) == 1.0
    assert found.score("No, there is not. Yes", yes) == 0.0
    assert found.score("There is not a dog", no) == 1.0
    assert found.score("A dog", no) == 0.0


def test_a_folder_with_one_file_is_enough(folder: Path) -> None:
    write(folder / "notes.json", {"something": "else"})
    row = {"question_id": 1, "image": "n123.jpg", "text": "Is there a cat?", "label": "no"}
    write(folder / "pope.jsonl", json.dumps(row))
    assert datasets.read(folder).name == "POPE"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"data": [{"question": "?", "image_id": "nowhere", "answers": ["a"]}]}, "has no picture 'nowhere'"),
        ([1, 2], "is wanted, found none"),
        ("no JSON", "is wanted, found none"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, content: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        datasets.read(write(folder / "file.json", content))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("The  Cat!", "cat"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("two dogs, three cats", "2 dogs 3 cats"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
        ("None", "0"),
    ],
)
def test_answers_are_normalized(given: str, wanted: str) -> None:
    assert scoring.normalized(given) == wanted


def test_f1() -> None:
    # Said: yes yes no no; true: yes no yes no.
    found = scoring.f1([1, 0, 0, 1], [True, False, True, False])
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5}


def test_intervals() -> None:
    low, high = scoring.interval([1.0] * 90 + [0.0] * 10)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # Wilson, 90 of 100
    assert scoring.interval([1.0] * 50) == pytest.approx((0.9287, 1.0), abs=1e-4)
    fractions = scoring.interval([0.0, 1 / 3, 1.0] * 100)
    assert fractions[0] < 4 / 9 < fractions[1]
    assert fractions[1] - fractions[0] < 0.12


def test_paired_differences_see_more_than_intervals() -> None:
    theirs = [1.0, 0.0] * 200
    ours = list(theirs)
    for i in range(1, 41, 2):
        ours[i] = 1.0  # 20 more, none fewer
    mean, low, high = scoring.paired(ours, theirs)
    assert mean == pytest.approx(0.05)
    assert 0.02 < low < mean < high < 0.08
    assert scoring.interval(ours)[0] < scoring.interval(theirs)[1], "the intervals overlap"
    assert scoring.paired(theirs, ours)[0] == pytest.approx(-0.05)
    assert scoring.paired(theirs, theirs) == (0.0, 0.0, 0.0)
