# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench serving``: throughput of vLLM with and without dropping."""

from __future__ import annotations

import json as js
from typing import Annotated

import typer

from ..options import DryRun, Json, Load, Markdown, refusals
from .measurement import measure_sheet


def serving(
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A LLaVA-1.5. Default: a narrow one with random weights.")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Fields of MustDropConfig. Default: budget-128, or a schedule for the narrow model."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="vLLM's; bfloat16 is not served on processors with AMX.")] = "auto",
    concurrency: Annotated[str, typer.Option(help="Numbers of requests in flight, with commas between.")] = "1,8,32",
    requests: Annotated[int, typer.Option(min=1, help="Requests for each one in flight; four at least.")] = 2,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over both engines.")] = 3,
    blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of the pool. Default: vLLM's choice.")] = None,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Measure requests/s, time to the first token and blocks of vLLM, full and dropping alternately.

    Requires vLLM, except for --dry-run and --load. Two engines run at once, in separate processes.
    """
    with refusals():
        from ...bench import serving as measurement

        try:
            fields = None if plan is None else js.loads(plan)
        except js.JSONDecodeError as error:
            raise ValueError(f"--plan is not JSON: {error}") from None
        in_flight = tuple(int(text) for text in concurrency.split(","))
        options = measurement.Options(model, fields, dtype, in_flight, requests, new_tokens, rounds, blocks)
    measure_sheet(measurement, options, "Requests in vLLM", json=json, load=load, dry_run=dry_run, markdown=markdown)
