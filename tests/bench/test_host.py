# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench host`: calls of the Triton operators on a driver that launches nothing."""

from __future__ import annotations

import json

import pytest
from processes import output_of_python, run_python

pytest.importorskip("triton")


def test_dry_run_names_every_operator(mustdrop):
    result = mustdrop("bench", "host", "--dry-run", "--seconds", "0.5")
    assert result.exit_code == 0, result.output
    for op in ("spatial_merge", "topk_attention_select", "compact_kv_"):
        assert op in result.output
    assert "about 13 s" in result.output


def test_launches_are_counted_and_timed(tmp_path):
    path = tmp_path / "host.json"
    command = ("-m", "mustdrop_kernels", "bench", "host")
    words = ("--seconds", "0.01", "--json", path, "--markdown")
    table = output_of_python(*command, *words, without="TRITON_INTERPRET")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["launches"] >= 1 and row["us"] > 0 and row["us_triton_path"] > 0 for row in rows)
    assert output_of_python(*command, "--load", path, "--markdown", without="TRITON_INTERPRET") == table
    refused = run_python(*command, TRITON_INTERPRET="1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "TRITON_INTERPRET is set" in refused.stderr
