# SPDX-License-Identifier: Apache-2.0
"""bench/overhead.py: two models take turns, and the table is what the file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "overhead.py"


def run(*arguments: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_pairs_of_steps_are_compared(tmp_path):
    out = tmp_path / "overhead.json"
    said = run("--threads", 1, "--layers", 4, "--width", 64, "--tokens", 4, "--turns", 2, "--json", out)
    document = json.loads(out.read_text())
    for name, row in document["rows"].items():
        assert f"| {name} | " in said
        assert row["pairs"] == 2 * (4 - 1)
        low, high = row["ratio_interval"]
        assert 0 < low <= row["ratio"] <= high
    kept, dropped = (document["rows"][name]["cache_bytes"] for name in ("image, all kept", "image, budget-64"))
    assert kept["drop_tokens"] == kept["plain"] == dropped["plain"] > dropped["drop_tokens"]
    assert document["rows"]["text alone"]["cache_bytes"] is None
    assert run("--load", out) == said
