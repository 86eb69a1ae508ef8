# SPDX-License-Identifier: Apache-2.0
"""Runs of Python in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LONGEST = 1800  # seconds, after which a run that hangs is killed


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders in front."""
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def run_python(
    *arguments: object, folder: Path | None = None, without: str | tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """This Python with these arguments, in `folder`; `environment` is added to that of the tests.

    Variables whose names begin with `without` are left out.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=LONGEST,
        cwd=folder, env={**inherited, **environment},
    )  # fmt: skip


def output_of_python(*arguments: object, **settings: Any) -> str:
    """Standard output of a run that must succeed; the settings are those of ``run_python``."""
    done = run_python(*arguments, **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
