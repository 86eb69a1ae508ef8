# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench decode``: the cost of ``drop_tokens`` in a decode step."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import DryRun, Json, Load, Markdown, refusals
from .measurement import measure_sheet


def decode(
    layers: Annotated[int, typer.Option(min=4, help="Language layers.")] = 32,
    width: Annotated[int, typer.Option(min=64, help="Width of a language layer, a multiple of 64.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a generation.")] = 96,
    turns: Annotated[int, typer.Option(min=1, help="Measured generations of each prompt.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads on a CPU.")] = 2,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
) -> None:
    """Compare a decode step inside drop_tokens with one of the plain model.

    Two models with the same random weights decode alternately, token by token, for four prompts: text alone, an image
    that keeps its tokens, one that loses most of them, and a padded batch. CPU only.
    """
    with refusals():
        from ...bench import decode as measurement

        options = measurement.Options(layers, width, tokens, turns, threads)
    measure_sheet(measurement, options, "Decode steps", json=json, load=load, dry_run=dry_run, markdown=markdown)
