# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench serving``: throughput of vLLM with and without dropping, and with smaller images."""

from __future__ import annotations

import json as js
from typing import Annotated

import typer

from ..options import DryRun, Json, Load, Markdown, refusals
from .measurement import carry_out, show_sheet


def serving(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A LLaVA, or a name of `mustdrop bench model`, with random weights. "
            "Default: llava-1.5-shallow on a CPU, llava-1.5-7b on a GPU.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Fields of MustDropConfig, or a preset and such fields. Default: budget-128."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="vLLM's; bfloat16 is not served on processors with AMX.")] = "auto",
    concurrency: Annotated[
        str | None,
        typer.Option(help="Numbers of requests in flight, with commas between. Default: 1,8,32; 1,8,32,128 on a GPU."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests for each one in flight; four at least.")] = 2,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answers.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all engines, after one to warm up.")] = 3,
    blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of the pool. Default: vLLM's choice.")] = None,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Measure rates, times and cache blocks of vLLM: with all image tokens, with dropping, with smaller images.

    The engines run alternately on vLLM's device, in separate processes. Smaller images have about as many tokens as
    dropping keeps on average over the layers; they are left out for models that have no such setting. The document is
    written after each round. Requires vLLM, except for --dry-run and --load.
    """
    with refusals():
        from ...bench import serving as measurement
        from ...bench.documents import command_line

        try:
            fields = None if plan is None else js.loads(plan)
        except js.JSONDecodeError as error:
            raise ValueError(f"--plan is not JSON: {error}") from None
        if not isinstance(fields, dict | None):
            raise ValueError(f"--plan must be a JSON object with fields of MustDropConfig, got {plan}")
        in_flight = None if concurrency is None else tuple(int(text) for text in concurrency.split(","))
        options = measurement.Options(model, fields, dtype, in_flight, requests, new_tokens, rounds, blocks)
    document = carry_out(
        plan=lambda: measurement.plan_lines(options),
        run=lambda tell, keep: measurement.run(options, command_line(), tell, keep),
        read=measurement.read, json=json, load=load, dry_run=dry_run,
    )  # fmt: skip
    if document is not None:
        show_sheet(measurement.sheet(document), "Requests in vLLM", markdown)
