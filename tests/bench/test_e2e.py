# SPDX-License-Identifier: Apache-2.0
"""bench/e2e.py from beginning to end on a model of no size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "e2e.py"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_e2e(tmp_path, cache):
    pytest.importorskip("transformers")
    path = tmp_path / "e2e.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        "tiny",
        "--tokens",
        "full,64",
        "--batch",
        "2",
        "--new-tokens",
        "3",
        "--cache",
        cache,
    ]
    done = subprocess.run(
        [*command, "--repeats", "1", "--threads", "1", "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    full, cut = json.loads(path.read_text())["rows"]
    assert (full["setting"], cut["setting"]) == ("full", "64")
    assert full["mean_vision_tokens"] == 576
    assert cut["mean_vision_tokens"] < 200
    assert cut["kv_bytes"] < full["kv_bytes"] / 2
    assert full["decode_tokens_per_second"] > 0
    assert {"vision tower", "language layers 0-3", "everything else"} <= set(full["stages_ms"])
    assert {"+ merge", "+ layer 2", "+ evict"} <= set(cut["stages_ms"])
    assert "tiny, random weights" in done.stdout
    again = subprocess.run(
        [sys.executable, str(SCRIPT), "--load", str(path), "--markdown"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("\n| 2 | ") == 2
