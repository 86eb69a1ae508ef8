# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench model` on a model of no size."""

from __future__ import annotations

import json

import pytest
from processes import output_of_python

pytest.importorskip("transformers")


def bench(*words):
    return output_of_python("-m", "mustdrop_kernels", "bench", "model", *words)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_model(tmp_path, cache):
    path = tmp_path / "model.json"
    words = ["--model", "tiny", "--tokens", "full,64", "--batch", 2, "--new-tokens", 3, "--cache", cache]
    said = bench(*words, "--repeats", 1, "--threads", 1, "--json", path)
    full, cut = json.loads(path.read_text())["rows"]
    assert (full["setting"], cut["setting"]) == ("full", "64")
    assert full["mean_vision_tokens"] == 576
    assert cut["mean_vision_tokens"] < 200
    assert cut["kv_bytes"] < full["kv_bytes"] / 2
    assert full["decode_tokens_per_second"] > 0
    assert {"vision tower", "language layers 0-3", "everything else"} <= set(full["stages_ms"])
    assert {"+ merge", "+ layer 2", "+ evict"} <= set(cut["stages_ms"])
    assert "tiny, random weights" in said
    assert bench("--load", path, "--markdown").count("\n| 2 | ") == 2


def test_dry_run_says_what_it_takes(mustdrop):
    result = mustdrop("bench", "model", "--dry-run", "--device", "cuda", "--batch", "1,32")
    assert result.exit_code == 0, result.output
    assert "llava-1.5-7b: 7.06 billion weights, 14.1 GB in bfloat16" in result.output
    assert "batch 32: a KV cache of 11.8 GB without dropping" in result.output
    assert "5 rounds" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llava-9"], "--model: there is no 'llava-9'; there are llava-1.5-7b"),
        (["--tokens", "full,7"], "--tokens: there is no '7'; there are full, 192"),
        (["--cache", "none"], "--cache: there is no 'none'"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--load", "missing.json"], "missing.json"),
    ],
)
def test_refusals(mustdrop, words, message):
    result = mustdrop("bench", "model", *words)
    assert result.exit_code == 2
    assert message in result.output
