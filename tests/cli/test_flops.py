# SPDX-License-Identifier: Apache-2.0
"""``mustdrop flops``: the table, the document, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from mustdrop_kernels import flops


def test_table_has_every_budget(mustdrop) -> None:
    result = mustdrop("flops")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("budget-192", "budget-128", "budget-64"))


def test_document_is_the_account(mustdrop, as_json) -> None:
    found = as_json(mustdrop("flops", "--keep", 64, "--text", 0, "--counting", "fastv", "--dtype", "float32", "--json"))
    model = flops.MODELS["llava-1.5-7b"]
    assert found == {
        "64 in every layer": flops.account(model, [64] * 32, text=0, counting="fastv", element_size=4).to_dict()
    }


def test_a_checkpoint_s_sizes_are_read(mustdrop, as_json, checkpoint) -> None:
    found = as_json(mustdrop("flops", "--model", checkpoint, "--keep", 10, "--json"))["10 in every layer"]
    assert found["processed"] == [10] * 8
    assert as_json(mustdrop("flops", "--model", checkpoint, "--keep", 10, "--vision", 20, "--json"))


def test_the_documentation_has_these_figures(mustdrop, as_json) -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    if not page.exists():
        pytest.skip("not in a source checkout")
    text = page.read_text()
    for name, one in as_json(mustdrop("flops", "--json")).items():
        assert (
            f"| `{name}` | {one['mean_tokens']:.0f} | {one['saved']:.1%} fewer | {one['saved_bytes']:.1%} smaller |"
            in text
        )


def test_headline(mustdrop, as_json) -> None:
    assert as_json(mustdrop("flops", "--headline", "--json")) == flops.headline()
    assert "88.6%" in mustdrop("flops", "--headline").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "nowhere"), "there is no 'nowhere'"),
        (("--preset", "192"), "take a preset with budgets"),
        (("--preset", "none"), "no preset 'none'"),
        (("--preset", "budget-64", "--keep", 3), "one of them"),
        (("--keep", 577), "only 576"),
        (("--counting", "mine"), "there is no 'mine'"),
        (("--dtype", "int4"), "there is no 'int4'"),
    ],
)
def test_refusals_are_one_sentence(words, sentence, mustdrop) -> None:
    result = mustdrop("flops", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mustdrop: ")
    assert sentence in result.stderr
