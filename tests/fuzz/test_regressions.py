# SPDX-License-Identifier: Apache-2.0
"""Replay of stored cases on which a backend differed, on every backend."""

from __future__ import annotations

import json

import pytest
from ops.conftest import pairs

from .families import FAMILIES
from .runners import Here
from .search import REGRESSIONS, replay

KEPT = sorted(REGRESSIONS.glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_no_backend_differs(path):
    op = json.loads(path.read_text())["case"]["op"]
    names = [pair.name for pair in pairs() if pair.device == "cpu"]
    replay(path, FAMILIES[op], [Here(name) for name in names])
