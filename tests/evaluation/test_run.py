# SPDX-License-Identifier: Apache-2.0
"""``mustdrop eval``: it goes on where it stopped, says the same either way, and draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mustdrop_kernels.evaluation import datasets, results, run, summary

CELLS = [("full", None), ("after-0", None), ("cls", 64.0), ("mustdrop", 64.0), ("fastv", 32.0)]


def quiet(what: str, share: float) -> None:
    assert 0 <= share <= 1


def fill(
    document: results.Document, subject, asked: datasets.Questions, keep=lambda document: None
) -> results.Document:
    run.run(document, subject, asked, quiet, keep, batch=4, every_s=0.0)
    return document


def without_times(document: results.Document) -> list[dict]:
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in document["cells"]]


@pytest.fixture(scope="module")
def whole(subject, asked) -> results.Document:
    sizes = {"layers": 12, "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 4, "vision": 576}
    about = {"model": "small", "questions": "digits", "dtype": "float32", "sizes": sizes}
    document = fill(results.start(about, asked, CELLS), subject, asked)
    return {
        **document,
        "machine": {"name": "a machine", "threads": 1, "torch": "2", "mustdrop_kernels": "0", "commit": ""},
    }


def test_every_cell_has_every_question_or_a_reason(whole: results.Document) -> None:
    for cell in whole["cells"]:
        if cell["why_not"]:
            assert (cell["method"], cell["budget"]) == ("fastv", 32.0)
        else:
            assert len(cell["right"]) == 12
            assert set(cell["right"]) <= {0, 1}
            assert cell["seconds"] > 0


def test_counts_are_those_of_the_method(whole: results.Document) -> None:
    full, after, cls, mustdrop, _ = whole["cells"]
    assert full["tokens"] == [576.0] * 3
    assert full["processed"] == [576.0] * 12
    assert after["processed"] == [576.0] + [0.0] * 11
    assert cls["processed"] == [64.0] * 12
    assert mustdrop["tokens"][0] == pytest.approx(64, abs=1)
    slot = 2 * 4 * 32 * 4
    text = full["text"]
    assert cls["text"] == text
    assert full["kv_bytes"][0] == pytest.approx((576 + text) * 12 * slot, rel=0.01)
    assert mustdrop["kv_bytes"][0] < cls["kv_bytes"][0], "stage 3 cuts the cache of all layers to the last number"


def test_a_stopped_run_goes_on(whole: results.Document, subject, asked, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(document: results.Document) -> None:
        results.write(document, path)
        raise Stopped

    path = tmp_path / "folder" / "eval.json"
    new = results.start(whole["about"], asked, CELLS)
    with pytest.raises(Stopped):
        fill(results.resume(new, path), subject, asked, stop)
    half = results.read(path)
    assert [len(cell["right"]) for cell in half["cells"]] == [4, 4, 4, 4, 0]
    more = results.start(whole["about"], asked, [*CELLS, ("random", 32.0)])
    resumed = fill(results.resume(more, path), subject, asked)
    assert without_times(resumed)[: len(CELLS)] == without_times(whole)
    assert len(resumed["cells"][-1]["right"]) == 12, "a method that was added later has caught up"


def test_another_question_does_not_go_on(whole: results.Document, asked, tmp_path: Path) -> None:
    results.write(whole, tmp_path / "eval.json")
    other = results.start({**whole["about"], "seeds": [5]}, asked, CELLS)
    with pytest.raises(ValueError, match="is about other questions"):
        results.resume(other, tmp_path / "eval.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a document of mustdrop eval"):
        results.read(tmp_path / "other.json")


def test_tables_say_what_the_cells_hold(whole: results.Document) -> None:
    text = summary.markdown(whole, "mustdrop")
    full = sum(whole["cells"][0]["right"]) / 12
    assert f"all 576 tokens {100 * full:.1f} (" in text
    assert "| after layer 0 |" in text
    assert "not reached" in text
    assert "Points by which `mustdrop` is ahead" in text
    assert "Points by which" in summary.markdown(whole, "cls", "points")
    assert "after layer" not in summary.markdown(whole, "cls", "points")


def test_late_kinds_are_those_that_early_dropping_hurts(whole: results.Document) -> None:
    assert set(summary.late(whole)) <= set(summary.kinds(whole))
    kinds = ["easy", "late"] * 20
    cells = [
        {"method": "full", "budget": None, "right": [1, 1] * 20, "processed": [1.0] * 12},
        {"method": "after-0", "budget": None, "right": [1, 0] * 20, "processed": None},
        {"method": "after-2", "budget": None, "right": [1, 0] * 20, "processed": None},
    ]
    assert summary.late({"kinds": kinds, "cells": cells}) == ["late"]


def test_it_draws(whole: results.Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary.draw(whole, tmp_path / "plot.png", "mustdrop")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_command(mustdrop: Callable, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    words = ["eval", "--methods", "cls,preset-small-64", "--budgets", "64", "--count", "6", "--no-layers"]
    done = mustdrop(*words, "--seeds", "7,8", "--json", path, "--markdown", "all", "--ours", "cls")
    assert done.exit_code == 0, done.output
    assert "| `cls` |" in done.stdout
    document = json.loads(path.read_text())
    assert [cell["method"] for cell in document["cells"]] == ["full", "cls", "preset-small-64"]
    assert document["about"]["seeds"] == [7, 8]
    assert document["machine"]["torch"]
    assert mustdrop("eval", "--load", path, "--markdown", "all", "--ours", "cls").stdout == done.stdout


def test_command_on_a_file_of_questions(mustdrop: Callable, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    rows = [
        {"question_id": i, "image": "a.png", "text": "Is there a red box?", "label": x}
        for i, x in enumerate(("yes", "no"))
    ]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, rows)))
    words = ["eval", "--questions", str(tmp_path), "--methods", "cls", "--budgets", "64", "--no-layers"]
    done = mustdrop(*words, "--json", tmp_path / "out" / "eval.json")
    assert done.exit_code == 0, done.output
    document = results.read(tmp_path / "out" / "eval.json")
    assert document["truth"] == [True, False]
    assert all(sum(cell["right"]) == 1 for cell in document["cells"]), "one answer for both, right once"
    assert all("f1" in row for row in summary.rows(document))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "best"], "there is no method 'best'"),
        (["--split", "exam"], "there is no 'exam'"),
        (["--questions", "nowhere"], "nowhere"),
        (["--load", "nowhere.json"], "nowhere.json"),
        (["--methods", "preset-65"], "no preset '65'"),
    ],
)
def test_refusals_are_one_sentence(mustdrop: Callable, words: list[str], sentence: str) -> None:
    done = mustdrop("eval", "--count", "2", *words)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
