# SPDX-License-Identifier: Apache-2.0
"""bench/serving.py says what it would run; tests/integrations/vllm_plugin runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "serving.py"


def test_dry_run_says_what_the_arms_are():
    plan = {"merge": False, "budgets": [1], "pruning_layers": [0]}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--rounds", "2", "--concurrency", "1,4", "--model", "some"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *engines, rounds = output.splitlines()
    arms = {name: json.loads(settings) for name, settings in (line.split(" ", 1) for line in engines)}
    assert list(arms) == ["full", "dropped"]
    assert arms["dropped"].pop("hf_overrides")["mustdrop"]
    assert arms["full"] == arms["dropped"], "they differ in dropping alone"
    assert rounds == "2 rounds of [1, 4] requests in flight"
    given = subprocess.run([*command, "--plan", json.dumps(plan)], check=True, capture_output=True, text=True).stdout
    assert json.dumps(plan) in given
