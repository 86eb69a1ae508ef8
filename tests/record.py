# SPDX-License-Identifier: Apache-2.0
"""Record of test outcomes in MUSTDROP_TEST_RECORD, one line per test as it ends, so that it survives an aborted run.

A line is {"collected": n} or {"test": node id, "outcome": "passed", "failed" or "skipped"}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Enable the record if the variable is set; under xdist only the controller writes."""
    path = os.environ.get("MUSTDROP_TEST_RECORD")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Record(Path(path)))


class Record:
    """Pytest plug-in that writes a line as each test ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, **line: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # the controller of xdist has none
            self._write(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._write(collected=len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            self._write(test=report.nodeid, outcome=report.outcome)


def read(path: Path) -> dict[str, Any]:
    """{"passed": n, "failed": n, "skipped": n, "not_reached": n, "names": failed tests}."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # A test that fails in its teardown has two lines.
    outcomes: dict[str, str] = {}
    for line in lines:
        if "test" in line and outcomes.get(line["test"]) != "failed":
            outcomes[line["test"]] = line["outcome"]
    collected = max((line["collected"] for line in lines if "collected" in line), default=0)
    counts: dict[str, Any] = {
        kind: sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "failed", "skipped")
    }
    names = [name for name, outcome in outcomes.items() if outcome == "failed"]
    return {**counts, "not_reached": max(0, collected - len(outcomes)), "names": names}
