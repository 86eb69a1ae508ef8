# SPDX-License-Identifier: Apache-2.0
"""Train the small LLaVA of `mustdrop demo` and `mustdrop eval` from random weights on a CPU.

python training/train.py --out out/accuracy     # about 70 minutes on one core; an interrupted run resumes
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import language
import torch
import tower
import typer
from loop import fit
from model import build, save


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, the log and the trained model.")] = Path(
        "out/accuracy"
    ),
    seed: Annotated[int, typer.Option(help="Seed of weights, images and questions.")] = 0,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the language model.")] = 12,
    width: Annotated[int, typer.Option(min=32, help="Width of tower and language model, a multiple of 32.")] = 128,
    vision_layers: Annotated[int, typer.Option(min=2, help="Of the tower.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    steps: Annotated[int | None, typer.Option(help="Steps of each stage instead of the recipe's, for tests.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after N steps: tower:N or language:N.")] = None,
    validation: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 30,
) -> None:
    """Train the small LLaVA, or resume its training."""
    torch.set_num_threads(threads)
    model = build(seed, layers=layers, width=width, vision_layers=vision_layers)
    name, _, count = (until or "").partition(":")
    for task in (
        tower.TowerTask(model, seed, _cut(tower.RECIPE, steps), validation),
        language.LanguageTask(model, seed, _cut(language.RECIPE, steps), validation),
    ):
        if not fit(task, out, every_s=every, until=int(count) if task.name == name else None):
            return
    save(model, out / "model")


def _cut(recipe: list[Any], steps: int | None) -> list[Any]:
    return recipe if steps is None else [dataclasses.replace(stage, steps=steps) for stage in recipe]


if __name__ == "__main__":
    typer.run(main)
