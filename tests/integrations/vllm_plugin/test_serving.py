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


def test_serving(checkpoint, tmp_path):
    path = tmp_path / "serving.json"
    command = [*SERVING, "--markdown", "--model", str(checkpoint), "--json", str(path), "--rounds", "1"]
    command += ["--concurrency", "1,3", "--requests", "2", "--new-tokens", "4", "--dtype", "float32"]
    command += ["--plan", '{"merge": false, "key_rate": 0.0, "pruning_layers": [2, 4], "budgets": [64, 32]}']
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=900).stdout
    document = json.loads(path.read_text())
    assert document["machine"]["vllm"]
    rows = {(row["arm"], row["concurrency"]): row for row in document["rows"]}
    assert set(rows) == {(arm, n) for arm in ("full", "dropped") for n in (1, 3)}
    assert all(row["requests_per_s"] > 0 and row["first_token_s"] > 0 for row in rows.values())
    # Three requests in flight do not need three full prompts' blocks once two of them have dropped.
    assert rows["dropped", 3]["held_blocks"] < rows["full", 3]["held_blocks"] == rows["full", 3]["peak_blocks"]
    shown = [*SERVING, "--load", str(path), "--markdown"]
    assert subprocess.run(shown, env=environment, check=True, capture_output=True, text=True).stdout in output
    assert "| 3 | dropped |" in output
