# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench``: a sub-command for each subject."""

from __future__ import annotations

import typer

from .decode import decode
from .host import host
from .model import model
from .ops import ops
from .serving import serving

app = typer.Typer(
    help="Measure the operators, or what dropping saves and costs. All have --dry-run, --json, --load and --markdown.",
    no_args_is_help=True,
)
for command in (ops, decode, host, model, serving):
    app.command()(command)
