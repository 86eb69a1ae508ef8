# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench model``: a whole LLaVA with and without dropping."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from ..options import DryRun, Json, Load, Markdown, Threads, check_device, refusals
from .measurement import carry_out, show_sheet


def model(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(
            help="llava-1.5-7b, llava-1.5-13b, llava-1.5-narrow (all layers, less width), llava-1.5-shallow (12 "
            "layers), tiny. Default: narrow on a CPU, 7b on a GPU."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16. Default: float32; bfloat16 on a GPU.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes with commas between, such as 1,32.")] = "1",
    tokens: Annotated[
        str, typer.Option(help="Mean vision tokens with commas between, of full, 192, 128, 64.")
    ] = "full,192,128,64",
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answers.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all settings.")] = 5,
    cache: Annotated[
        str,
        typer.Option(help="dynamic, or static: on a GPU transformers compiles its decode step into a CUDA graph."),
    ] = "dynamic",
    threads: Threads = None,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Measure a whole LLaVA with random weights: first token, decode rate, memory, and the parts of the prefill.

    The document is written after each batch size; Ctrl-C and SIGTERM end the rounds.
    """
    with refusals():
        from ...bench import model as measurement
        from ...bench.documents import command_line

        on_cpu = device == "cpu"
        check_device(device, used=not (dry_run or load))
        if threads is not None:
            torch.set_num_threads(threads)
        options = measurement.Options(
            device=torch.device(device),
            model=model or ("llava-1.5-narrow" if on_cpu else "llava-1.5-7b"),
            dtype=dtype or ("float32" if on_cpu else "bfloat16"),
            batches=tuple(int(text) for text in batch.split(",")),
            settings=tuple(tokens.split(",")),
            new_tokens=new_tokens,
            repeats=repeats,
            cache=cache,
        )
    document = carry_out(
        plan=lambda: measurement.plan_lines(options),
        run=lambda tell, keep: measurement.run(options, command_line(), tell, keep),
        read=measurement.read, json=json, load=load, dry_run=dry_run,
    )  # fmt: skip
    if document is None:
        return
    if markdown:
        show_sheet(measurement.sheet(document), "", markdown)
    else:
        measurement.show(document, Console())
