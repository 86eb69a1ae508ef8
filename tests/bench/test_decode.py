# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench decode`: two models take turns, and the table is what the file says."""

from __future__ import annotations

import json

import pytest
from processes import output_of_python

pytest.importorskip("transformers")


def run(*arguments: object) -> str:
    return output_of_python("-m", "mustdrop_kernels", "bench", "decode", *arguments)


def test_pairs_of_steps_are_compared(tmp_path):
    out = tmp_path / "decode.json"
    words = ("--threads", 1, "--layers", 4, "--width", 64, "--tokens", 4, "--turns", 2)
    said = run(*words, "--json", out, "--markdown")
    document = json.loads(out.read_text())
    for name, row in document["rows"].items():
        assert f"| {name} | " in said
        assert row["pairs"] == 2 * (4 - 1)
        low, high = row["ratio_interval"]
        assert 0 < low <= row["ratio"] <= high
    kept, dropped = (document["rows"][name]["cache_bytes"] for name in ("image, all kept", "image, budget-64"))
    assert kept["drop_tokens"] == kept["plain"] == dropped["plain"] > dropped["drop_tokens"]
    assert document["rows"]["text alone"]["cache_bytes"] is None
    assert run("--load", out, "--markdown") == said


def test_dry_run_says_what_it_takes(mustdrop):
    result = mustdrop("bench", "decode", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "32 layers of width 1024: 1.36 GB of float32 weights" in result.output
    for name in ("text alone", "image, all kept", "image, budget-64", "two images, one padded, budget-64"):
        assert f"{name}: 7 pairs of generations" in result.output
    assert "6144 tokens are generated" in result.output
