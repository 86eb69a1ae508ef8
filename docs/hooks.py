# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs: the operators' pages, tables that `mustdrop bench ops` prints, and formulas.

A line `<!-- mustdrop bench ... -->` becomes what the command prints. A block "```math" and inline $`...`$, which GitHub
shows as formulas too, become MathML, so that a browser needs no script for them.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from latex2mathml.converter import convert
from typer.testing import CliRunner

from mustdrop_kernels import ops
from mustdrop_kernels.cli.app import app

COMMAND = re.compile(r"^<!-- mustdrop (bench [^\n]*) -->$", flags=re.MULTILINE)
FORMULA = re.compile(r"^```math\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`([^`\n]+)`\$")


def on_config(config: Any) -> Any:
    """List the operators' pages in the navigation."""
    pages: list[Any] = ["ops/index.md", *({op: f"ops/{op}.md"} for op in ops.OPS)]
    for section in config.nav:
        if "Operators" in section:
            section["Operators"] = pages
    return config


def printed(words: str) -> str:
    """Standard output of a command of `mustdrop`."""
    result = CliRunner().invoke(app, shlex.split(words))
    if result.exit_code:
        raise RuntimeError(f"mustdrop {words}: {result.output}")
    return result.output


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page."""
    markdown = COMMAND.sub(lambda found: printed(found[1]), markdown)
    markdown = FORMULA.sub(lambda found: f'<div class="formula">{convert(found[1], display="block")}</div>', markdown)
    return INLINE.sub(lambda found: convert(found[1]), markdown)
