# SPDX-License-Identifier: Apache-2.0
"""Fills in what the pages take from the repository: a line `<!-- mustdrop bench ... -->` becomes what it prints."""

from __future__ import annotations

import re
import shlex
from typing import Any

from typer.testing import CliRunner

from mustdrop_kernels.cli.app import app

COMMAND = re.compile(r"^<!-- mustdrop (bench [^\n]*) -->$", flags=re.MULTILINE)


def printed(words: str) -> str:
    """What a command of `mustdrop` prints."""
    result = CliRunner().invoke(app, shlex.split(words))
    if result.exit_code:
        raise RuntimeError(f"mustdrop {words}: {result.output}")
    return result.output


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page."""
    return COMMAND.sub(lambda found: printed(found[1]), markdown)
