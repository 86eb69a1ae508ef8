# SPDX-License-Identifier: Apache-2.0
"""The commands with their options and exit status; each command has its own module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .._version import __version__
from ..errors import Refusal
from .bench import app as bench
from .evaluate import evaluate
from .flops import flops
from .options import Backend, NewTokens, Prompt, Seed, refuse
from .progress import status

app = typer.Typer(
    name="mustdrop",
    help="Drop vision tokens over their whole life in a multimodal model: try it, check the installation, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _version(shown: bool) -> None:
    if shown:
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
    """Print one JSON document on standard output."""
    print(json.dumps(document, indent=2, allow_nan=False))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show the backend that serves each operator here, why the others do not, and what to do next.

    Ends with status 1 if something is wrong. --json prints what a bug report needs.
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
    prompt: Prompt = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="A LLaVA checkpoint. Default: the small one in the package."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Thresholds or budgets. Default: 192 for a checkpoint, small-64 for the small model."),
    ] = None,
    backend: Backend = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the report.")] = Path("out"),
    max_new_tokens: NewTokens = 24,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a picture through a LLaVA with and without dropping; print the savings and draw the dropped tokens."""
    from .demo import DemoOptions, run, show, to_dict

    options = DemoOptions(image, prompt, model, preset, backend, out, max_new_tokens, seed)
    try:
        with status(shown=not as_json) as progress:
            result = run(options, progress)
    except Refusal as refusal:
        refuse(str(refusal))
    if as_json:
        print_json(to_dict(result))
    else:
        show(result, Console())


@app.command()
def inspect(
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture; may be repeated. Default: one made here, of digits.")
    ] = None,
    prompt: Prompt = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID", help="A checkpoint of a supported model. Default: the small one in the package."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Default: 192 for a checkpoint, small-64 without one.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=JSON", help="Changes the preset, such as --set 'merge_at=\"features\"'."),
    ] = None,
    backend: Backend = None,
    out: Annotated[Path, typer.Option(help="File for the page.")] = Path("page.html"),
    max_new_tokens: NewTokens = 24,
    seed: Seed = 0,
) -> None:
    """Write a page of HTML about one prompt: merged and dropped tokens, and attention, with all pictures inside."""
    from .inspect import InspectOptions, run

    try:
        settings = _settings(set_)
        options = InspectOptions(image or (), prompt, model, preset, settings, backend, out, max_new_tokens, seed)
        with status(shown=True) as progress:
            result = run(options, progress)
    except Refusal as refusal:
        refuse(str(refusal))
    print(result.page)


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
