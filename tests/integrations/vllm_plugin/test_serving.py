# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench serving` from beginning to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

SERVING = [sys.executable, "-m", "mustdrop_kernels", "bench", "serving"]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def serving(*words: str) -> str:
    """What the command prints."""
    done = subprocess.run([*SERVING, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(path, *words: str) -> tuple[str, dict, dict]:
    """What the command prints, its document, and the rows by arm and requests in flight."""
    short = ("--rounds", "1", "--requests", "2", "--new-tokens", "4", "--dtype", "float32")
    output = serving("--markdown", "--json", str(path), *short, *words)
    document = json.loads(path.read_text())
    assert document["machine"]["vllm"]
    for row in document["rows"]:
        assert row["requests"] == max(4, 2 * row["concurrency"])
        assert row["tokens_per_s"] == pytest.approx(4 * row["requests_per_s"])
        assert row["requests_per_s"] == pytest.approx(row["requests"] / row["seconds"])
        assert 0 < row["between_tokens_s"] < row["seconds"]
        assert 0 < row["first_token_s"] < row["seconds"]
    assert serving("--load", str(path), "--markdown") in output
    return output, document, {(row["arm"], row["concurrency"]): row for row in document["rows"]}


@pytest.mark.slow
def test_with_a_checkpoint_smaller_images_are_left_out(checkpoint, tmp_path):
    plan = '{"merge": false, "key_rate": 0.0, "pruning_layers": [2, 4], "budgets": [64, 32]}'
    words = ("--model", str(checkpoint), "--concurrency", "1,3", "--plan", plan)
    output, document, rows = measured(tmp_path / "serving.json", *words)
    assert set(rows) == {(arm, n) for arm in ("full", "dropped") for n in (1, 3)}
    # Three requests in flight do not need three full prompts' blocks once two of them have dropped.
    assert rows["dropped", 3]["held_blocks"] < rows["full", 3]["held_blocks"] == rows["full", 3]["peak_blocks"]
    assert document["left_out"] in output
    assert "| 3 | dropped |" in output


def test_all_arms_with_random_weights(tmp_path):
    """budget-128 keeps 176 tokens on average over 16 layers, and 80 at last; smaller images have 13x13."""
    output, document, rows = measured(tmp_path / "serving.json", "--model", "tiny", "--concurrency", "2")
    assert set(rows) == {(arm, 2) for arm in ("full", "dropped", "smaller")}
    full, dropped, smaller = (rows[arm, 2] for arm in ("full", "dropped", "smaller"))
    assert document["vision_tokens"] == {"dropped": 176.0, "smaller": 169}
    assert full["prompt_tokens"] == dropped["prompt_tokens"]
    assert full["prompt_tokens"] - smaller["prompt_tokens"] == 576 - 169
    assert dropped["held_blocks"] < smaller["held_blocks"] < full["held_blocks"]
    assert [arm["block_size"] for arm in document["arms"].values()] == [32, 32, 32]
    assert "| 2 | smaller images |" in output
