# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench host``: host time of the Triton operators."""

from __future__ import annotations

from typing import Annotated

import typer

from .measurement import DryRun, Json, Load, Markdown, carry_out, refusals, show_sheet


def host(
    seconds: Annotated[float, typer.Option(min=0.001, help="For each number.")] = 1.0,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Time what Python does in a call of each Triton operator. Needs Triton and no GPU.

    The kernels are compiled for sm_90 and handed to a driver that does nothing; the last column takes Triton's own way
    to each launch.
    """
    with refusals():
        from ...bench import host as measurement
        from ...bench.documents import command_line

    document = carry_out(
        plan=lambda: measurement.plan_lines(seconds),
        run=lambda tell, keep: measurement.run(seconds, command_line(), tell),
        read=measurement.read, json=json, load=load, dry_run=dry_run,
    )  # fmt: skip
    if document is not None:
        show_sheet(measurement.sheet(document), "Host time of a call", markdown)
