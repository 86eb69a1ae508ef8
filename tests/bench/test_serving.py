# SPDX-License-Identifier: Apache-2.0
"""bench/serving.py says what it would run; tests/integrations/vllm_plugin runs it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "serving.py"


def test_dry_run_alternates_the_arms():
    plan = {"merge": False, "budgets": [1], "pruning_layers": [0]}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--rounds", "2", "--concurrency", "1,4", "--model", "some"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [shlex.split(line) for line in output.splitlines()]
    assert [line[line.index("--arm") + 1] for line in lines] == ["full", "dropped"] * 2
    assert all(line[line.index("--concurrency") + 1] == "1,4" for line in lines)
    assert len({line[-1] for line in lines}) == 4
    given = subprocess.run([*command, "--plan", json.dumps(plan)], check=True, capture_output=True, text=True).stdout
    assert json.dumps(plan) in given
