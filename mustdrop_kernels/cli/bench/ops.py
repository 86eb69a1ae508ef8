# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench ops``: time the operators beside their baselines."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

if TYPE_CHECKING:
    from ...bench.documents import Document

from ..options import DryRun, Json, Load, Markdown, Threads, check_device, refusals, refuse
from .measurement import carry_out

Ops = Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Operators to time. Default: all.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Backends = Annotated[str | None, typer.Option(help="Names with commas between. Default: what serves the device.")]
Baselines = Annotated[str | None, typer.Option(help='Names with commas between, or "none". Default: all.')]
Shapes = Annotated[
    str,
    typer.Option(help="llava-1.5, llava-next, video-mha, video-gqa, tiny, images-N, sweep; NAME:B for a batch of B."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, with commas between.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few rounds, no compiled baselines: a look, not a measurement.")]
Seconds = Annotated[
    float | None,
    typer.Option(
        min=0.001, help="To time each way of computing a case. Default: 2; 0.1 where quick.", show_default=False
    ),
]
NoCompiled = Annotated[
    bool, typer.Option("--no-compiled", help="Leave out the baselines that torch.compile makes: each takes seconds.")
]
Hot = Annotated[bool, typer.Option("--hot", help="Use the same inputs every time, so that they may stay in the cache.")]
Plot = Annotated[Path | None, typer.Option(help="Write pictures into this folder (needs matplotlib).")]
Compare = Annotated[Path | None, typer.Option(help="An older document to compare with.")]
_DTYPES = ("float32", "bfloat16", "float16")


def ops(
    operators: Ops = None,
    device: Device = "cpu",
    backends: Backends = None,
    baselines: Baselines = None,
    shapes: Shapes = "llava-1.5,llava-next",
    dtype: Dtype = None,
    quick: Quick = False,
    no_compiled: NoCompiled = False,
    seconds: Seconds = None,
    hot: Hot = False,
    json: Json = None,
    load: Load = None,
    dry_run: DryRun = False,
    markdown: Markdown = False,
    plot: Plot = None,
    compare: Compare = None,
    threads: Threads = None,
) -> None:
    """Time the operators beside other ways to compute the same, in interleaved rounds of one run.

    Each baseline's result is compared with ours first; one that differs is not timed, and the command ends with status
    1. The document is written after each case; Ctrl-C and SIGTERM end the measurement and keep the finished cases. With
    OPs, --load shows those rows of the document.
    """
    from ... import backends as registry
    from ...bench import report
    from ...bench.baselines import names as baseline_names
    from ...bench.cases import CASES
    from ...bench.documents import command_line
    from ...bench.run import Options, default_backends, run
    from ...bench.shapes import parse_shapes

    with refusals():
        check_device(device)
        chosen_baselines = None if baselines is None else () if baselines == "none" else _names(baselines)
        chosen_dtypes = _names(dtype) if dtype is not None else ("float32",) if device == "cpu" else ("bfloat16",)
        options = Options(
            ops=_known("operator", operators or CASES, CASES),
            backends=_known(
                "backend", default_backends(device) if backends is None else _names(backends), registry.registered()
            ),
            baselines=None if chosen_baselines is None else _known("baseline", chosen_baselines, baseline_names()),
            dtypes=tuple(getattr(torch, name) for name in _known("dtype", chosen_dtypes, _DTYPES)),
            shapes=tuple(parse_shapes(shapes)),
            device=torch.device(device),
            quick=quick,
            compiled=not no_compiled,
            seconds=seconds,
            hot=hot,
        )
        older = None if compare is None else report.read(compare)
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            refuse("--plot needs matplotlib: pip install 'mustdrop_kernels[bench]'")
        if threads is not None:
            torch.set_num_threads(threads)
    document = carry_out(
        plan=lambda: report.plan_lines(options),
        run=lambda tell, keep: run(options, command_line(), tell, keep),
        read=lambda path: report.only(report.read(path), operators),
        json=json, load=load, dry_run=dry_run,
    )  # fmt: skip
    if document is None:
        return
    console = Console()
    _show(document, older, markdown, console)
    if plot is not None:
        from ...bench import plots

        for path in plots.write_all(document, plot):
            console.print(f"wrote {path}", highlight=False)
    if document.get("stopped"):
        raise typer.Exit(130)
    if any(row["status"] == "wrong" for row in document["rows"]):
        raise typer.Exit(1)


def _show(document: Document, older: Document | None, markdown: bool, console: Console) -> None:
    from ...bench import report

    if markdown:
        console.print(report.markdown(document), markup=False, highlight=False, soft_wrap=True)
        return
    for table in report.tables(document):
        console.print(table)
    for line in report.notes(document):
        console.print(line, style="dim", markup=False, highlight=False)
    if older is not None:
        console.print(report.comparison_table(older, document))
        for line in report.comparison_notes(older, document):
            console.print(line, style="dim", markup=False, highlight=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _known(kind: str, names: Collection[str], there: Collection[str]) -> tuple[str, ...]:
    """The names; raises for unknown ones."""
    for name in names:
        if name not in there:
            raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(there)}")
    return tuple(names)
