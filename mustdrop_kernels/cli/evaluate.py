# SPDX-License-Identifier: Apache-2.0
"""``mustdrop eval``: accuracy of every method on the same questions at equal average tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from ..errors import Refusal
from .options import Load, NewTokens, Threads, refuse
from .progress import bar

if TYPE_CHECKING:
    from ..evaluation.datasets import Questions
    from ..evaluation.results import Key

Model = Annotated[
    str | None, typer.Option(metavar="FOLDER|HUB_ID", help="A LLaVA checkpoint. Default: the small one in the package.")
]
File = Annotated[
    Path | None,
    typer.Option("--questions", help="A file of TextVQA, GQA or POPE, or its folder. Default: made, framed digits."),
]
Images = Annotated[Path | None, typer.Option(help="Folder of the file's pictures. Default: the file's.")]
Methods = Annotated[str | None, typer.Option(help="With commas between; after-K and preset-NAME too. Default: all.")]
Budgets = Annotated[str, typer.Option(help="Vision tokens on average over the layers, with commas between.")]
Count = Annotated[int | None, typer.Option(min=1, help="Questions. Default: 1020 made ones, all of a file.")]
Seeds = Annotated[str, typer.Option(help="Seeds of made questions, with commas between.")]
Split = Annotated[str, typer.Option(help="Split of made questions: validation to choose settings, test to report.")]
Layers = Annotated[bool, typer.Option("--layers/--no-layers", help="First drop all vision after layer 0, 1, 2, ...")]
Ours = Annotated[str, typer.Option(help="The method that the others are compared with.")]
Quick = Annotated[bool, typer.Option("--quick", help="200 questions, 4 methods: a look, not a measurement.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the document here; go on where it stopped.")]
Plot = Annotated[Path | None, typer.Option(help="Draw accuracy against tokens into this file.")]
Markdown = Annotated[str | None, typer.Option(help="Print Markdown: all, or the table whose title begins with this.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions at a time.")]

QUICK_METHODS = ("random", "cls", "sparsevlm", "mustdrop-read")
OURS = "mustdrop-read"


def evaluate(
    model: Model = None,
    file: File = None,
    images: Images = None,
    methods: Methods = None,
    budgets: Budgets = "192,128,64,32",
    count: Count = None,
    seeds: Seeds = "0,1,2",
    split: Split = "test",
    layers: Layers = True,
    ours: Ours = OURS,
    quick: Quick = False,
    json: Json = None,
    plot: Plot = None,
    markdown: Markdown = None,
    load: Load = None,
    batch: Batch = 8,
    max_new_tokens: NewTokens = 4,
    threads: Threads = None,
) -> None:
    """Measure accuracy with all vision tokens and with fewer, by every method at equal average tokens."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if load is not None:
            from ..evaluation.results import read

            document = read(load)
        else:
            names = methods.split(",") if methods else list(QUICK_METHODS) if quick else None
            plan = _Plan(model, file, images, names, budgets, count or (200 if quick else None), seeds, split,
                         layers and not quick, json, batch, max_new_tokens)  # fmt: skip
            document = plan.carry_out()
    except (Refusal, ValueError, OSError) as error:
        refuse(str(error))
    _show(document, ours, markdown)
    if plot is not None:
        from ..evaluation.summary import draw

        draw(document, plot, ours)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Options of the command line."""

    model: str | None
    file: Path | None
    images: Path | None
    methods: Sequence[str] | None
    budgets: str
    count: int | None
    seeds: str
    split: str
    layers: bool
    json: Path | None
    batch: int
    max_new_tokens: int

    def carry_out(self) -> dict[str, Any]:
        """Measure; the filled document."""
        from ..bench.machine import describe
        from ..evaluation import results, run
        from ..evaluation.checkpoint import load_model, quiet_transformers
        from ..evaluation.methods import Sizes, Unreachable, make
        from ..flops import LanguageModel

        require_extras()
        quiet_transformers()
        questions, about = self._questions()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        subject = load_model(self.model, device)
        depth = subject.model.config.text_config.num_hidden_layers
        about |= {
            "model": subject.name, "sizes": dataclasses.asdict(LanguageModel.of(subject.model.config)),
            "dtype": str(subject.model.dtype).removeprefix("torch."), "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip
        cells = self._cells(depth)
        for cell in cells:  # unknown names raise before anything is measured
            with contextlib.suppress(Unreachable):
                make(*cell, Sizes.of(subject.model.config))
        document = results.start(about, questions, cells)
        if self.json is not None:
            document = results.resume(document, self.json)
        document["machine"] = describe(torch.device(device), torch.get_num_threads())
        document["command"] = "mustdrop " + " ".join(sys.argv[1:])

        def keep(filled: dict[str, Any]) -> None:
            if self.json is not None:
                results.write(filled, self.json)

        with bar() as tell:
            run.run(document, subject, questions, tell, keep, batch=self.batch, max_new_tokens=self.max_new_tokens)
        return document

    def _questions(self) -> tuple[Questions, dict[str, Any]]:
        from ..evaluation import datasets, pictures

        if self.file is not None:
            found = datasets.read(self.file, self.images).head(self.count)
            return found, {"questions": found.name, "file": self.file.name}
        if self.split not in pictures.SPLITS:
            raise ValueError(f"--split: there is no {self.split!r}; there are {', '.join(pictures.SPLITS)}")
        seeds = [int(seed) for seed in self.seeds.split(",")]
        found = datasets.made(self.split, seeds, self.count or 1020)
        return found, {"questions": found.name, "split": self.split, "seeds": seeds}

    def _cells(self, depth: int) -> list[Key]:
        from ..evaluation.methods import FULL, METHODS
        from ..evaluation.results import keys

        layers = [f"after-{layer}" for layer in range(depth - 1)] if self.layers else []
        methods = [name for name in self.methods or METHODS if name != FULL]
        return keys([FULL, *layers, *methods], [float(text) for text in self.budgets.split(",")])


def _show(document: dict[str, Any], ours: str, markdown: str | None) -> None:
    from ..evaluation import summary

    if markdown is not None:
        part = None if markdown == "all" else markdown
        print(summary.markdown(document, ours, part))
        return
    console = Console()
    for table in summary.tables(document, ours):
        console.print(table)
    for line in summary.notes(document):
        console.print(line, style="dim", markup=False, highlight=False)


def require_extras() -> None:
    """Raise ``Refusal`` if a package that generated questions require is missing."""
    from ..evaluation.checkpoint import require_packages

    needed = {"transformers": "transformers", "PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image"}
    require_packages("the evaluation", "eval", **needed)
