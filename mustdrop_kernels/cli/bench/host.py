# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench host``: host time of the Triton operators."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import DryRun, Json, Load, Markdown, refusals
from .measurement import measure_sheet


def host(
    seconds: Annotated[float, typer.Option(min=0.001, help="For each number.")] = 1.0,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Time the Python code of a call of each Triton operator. Requires Triton, no GPU.

    The kernels are compiled for sm_90 and launched by a driver that does nothing; the last column uses Triton's own
    launch path.
    """
    with refusals():
        from ...bench import host as measurement

    measure_sheet(measurement, seconds, "Host time of a call", json=json, load=load, dry_run=dry_run, markdown=markdown)
