# SPDX-License-Identifier: Apache-2.0
"""The ``mustdrop`` command. Requires typer and rich, which are optional: ``pip install 'mustdrop_kernels[cli]'``."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Entry point of the ``mustdrop`` command and of ``python -m mustdrop_kernels``."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        sys.exit(f"mustdrop: the command line needs {names}: pip install 'mustdrop_kernels[cli]'")
    from .app import app

    app(prog_name="mustdrop")
