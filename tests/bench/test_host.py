# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench host`: calls of the Triton operators on a driver that launches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_dry_run_names_every_operator(mustdrop):
    result = mustdrop("bench", "host", "--dry-run", "--seconds", "0.5")
    assert result.exit_code == 0, result.output
    for op in ("spatial_merge", "topk_attention_select", "compact_kv_"):
        assert op in result.output
    assert "about 13 s" in result.output


def test_launches_are_counted_and_timed(tmp_path):
    path = tmp_path / "host.json"
    command = [sys.executable, "-m", "mustdrop_kernels", "bench", "host"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def said(*words: str) -> str:
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = said("--seconds", "0.01", "--json", str(path), "--markdown")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["launches"] >= 1 and row["us"] > 0 and row["us_triton_path"] > 0 for row in rows)
    assert said("--load", str(path), "--markdown") == table
    refused = subprocess.run(command, capture_output=True, text=True, env={**environment, "TRITON_INTERPRET": "1"})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "TRITON_INTERPRET is set" in refused.stderr
