# SPDX-License-Identifier: Apache-2.0
"""Makes the scripts and packages of bench/ and tools/ importable; the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mustdrop_kernels.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "tools")]


@pytest.fixture(scope="session")
def mustdrop() -> Callable[..., Result]:
    """Runs ``mustdrop`` with these words."""
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words], prog_name="mustdrop")
