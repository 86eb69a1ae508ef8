# SPDX-License-Identifier: Apache-2.0
"""The commands. Each one's work is in its own module; here are its options and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._version import __version__
from ..errors import Refusal
from .bench import app as bench
from .evaluate import evaluate
from .flops import flops
from .progress import status

app = typer.Typer(
    name="mustdrop",
    help="Drop vision tokens over their whole life in a multimodal model: look at it, check it, time it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"mustdrop_kernels {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2, allow_nan=False))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say who serves each operator here, why others do not, and what to do next.

    Ends with status 1 if something is wrong.
    """
    from .doctor import examine, show

    found = examine()
    if as_json:
        print_json(found)
    else:
        show(found, Console())
    raise typer.Exit(0 if found["ok"] else 1)


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="A picture. Default: one made here, of digits.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about it. Default: one that fits it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="A LLaVA checkpoint. Default: the small one in the package."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Thresholds or budgets. Default: 192 for a checkpoint, small-64 for the small model."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Who computes. Default: who serves the device.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the report.")] = Path("out"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Which of the made pictures and questions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a picture through a LLaVA with and without dropping; print what it saves and draw what it dropped."""
    from . import demo as work

    wish = work.Wish(image, prompt, model, preset, backend, out, max_new_tokens, seed)
    try:
        with status(shown=not as_json) as step:
            outcome = work.run(wish, step)
    except Refusal as refusal:
        print(f"mustdrop: {refusal}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        print_json(work.to_dict(outcome))
    else:
        work.show(outcome, Console())


@app.command()
def inspect(
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture; may be repeated. Default: one made here, of digits.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about it. Default: one that fits it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="A checkpoint of a model that is served. Default: the small one."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Default: 192 for a checkpoint, small-64 without one.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=JSON", help="Changes the preset, such as --set 'merge_at=\"features\"'."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Who computes. Default: who serves the device.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("page.html"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Which of the made pictures and questions.")] = 0,
) -> None:
    """Write a page of HTML about one prompt: what was merged, dropped and looked at, with all pictures inside."""
    from . import inspect as work

    try:
        wish = work.Wish(image or (), prompt, model, preset, _settings(set_), backend, out, max_new_tokens, seed)
        with status(shown=True) as step:
            found = work.run(wish, step)
    except Refusal as refusal:
        print(f"mustdrop: {refusal}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(found.page)


def _settings(words: list[str] | None) -> dict[str, Any]:
    settings = {}
    for word in words or []:
        name, _, value = word.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            raise Refusal(f"--set: {word!r} must be a field of MustDropConfig, =, and JSON") from None
    return settings


app.add_typer(bench, name="bench")
app.command(name="eval")(evaluate)
app.command()(flops)
