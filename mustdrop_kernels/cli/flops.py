# SPDX-License-Identifier: Apache-2.0
"""``mustdrop flops``: operations and KV bytes that a schedule saves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..bench.units import size
from ..config import MustDropConfig
from ..flops import COUNTINGS, MODELS, Account, LanguageModel, account, schedule
from ..flops import headline as headline_rows
from .options import refuse

# Those for 32 layers; "small-64" is for the small model.
BUDGETS = [name for name in MustDropConfig.presets() if name.startswith("budget-")]
ELEMENTS = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}

Model = Annotated[
    str,
    typer.Option(metavar="NAME|FOLDER", help=f"{', '.join(MODELS)}, or a checkpoint's folder (config.json)."),
]
Preset = Annotated[
    str | None, typer.Option(help=f"{', '.join(BUDGETS)}. Default: all of them, where --keep is not given.")
]
Keep = Annotated[int | None, typer.Option(min=0, help="Number of vision tokens in every layer, instead of a preset.")]
Vision = Annotated[
    int | None,
    typer.Option(min=1, help="Vision tokens of the plain prompt. Default: those of one image."),
]
Text = Annotated[int, typer.Option(min=0, help="Text tokens. 0: vision alone, as some papers count.")]
Counting = Annotated[str, typer.Option(help=f"{', '.join(COUNTINGS)}.")]
Dtype = Annotated[str, typer.Option(help=f"Of the cache: {', '.join(ELEMENTS)}.")]
Headline = Annotated[bool, typer.Option("--headline", help="The published 88.5%, under every way of counting.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def flops(
    model: Model = "llava-1.5-7b",
    preset: Preset = None,
    keep: Keep = None,
    vision: Vision = None,
    text: Text = 60,
    counting: Counting = "exact",
    dtype: Dtype = "bfloat16",
    headline: Headline = False,
    as_json: AsJson = False,
) -> None:
    """Count the operations and the KV bytes of a prompt in the language model, with and without dropping."""
    console = Console()
    if headline:
        rows = headline_rows()
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            console.print(_headline_table(rows))
        return
    try:
        sizes = _sizes(model, vision)
        _check(preset, keep, counting, dtype)
        found = {
            name: account(sizes, *plan, text=text, counting=counting, element_size=ELEMENTS[dtype])
            for name, plan in _plans(sizes, preset, keep).items()
        }
    except ValueError as error:
        refuse(str(error))
    if as_json:
        print(json.dumps({name: one.to_dict() for name, one in found.items()}, indent=2))
    else:
        console.print(_table(model, sizes, dtype, found))


def _sizes(model: str, vision: int | None) -> LanguageModel:
    if model in MODELS:
        sizes = MODELS[model]
        return sizes if vision is None else dataclasses.replace(sizes, vision=vision)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model: there is no {model!r}; there are {', '.join(MODELS)}, or a folder")
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError("--model FOLDER needs transformers: pip install 'mustdrop_kernels[demo]'") from None
    return LanguageModel.of(AutoConfig.from_pretrained(model), vision)


def _check(preset: str | None, keep: int | None, counting: str, dtype: str) -> None:
    if preset is not None and keep is not None:
        raise ValueError("--preset and --keep: one of them")
    for option, name, there in (("counting", counting, COUNTINGS), ("dtype", dtype, ELEMENTS)):
        if name not in there:
            raise ValueError(f"--{option}: there is no {name!r}; there are {', '.join(there)}")


def _plans(sizes: LanguageModel, preset: str | None, keep: int | None) -> dict[str, tuple[list[int], list[int]]]:
    if keep is not None:
        if keep > sizes.vision:
            raise ValueError(f"--keep: there are only {sizes.vision} vision tokens, got {keep}")
        return {f"{keep} in every layer": ([keep] * sizes.layers, [keep] * sizes.layers)}
    names = BUDGETS if preset is None else [preset]
    return {name: schedule(sizes, MustDropConfig.preset(name)) for name in names}


def _table(model: str, sizes: LanguageModel, dtype: str, found: dict[str, Account]) -> Table:
    first = next(iter(found.values()))
    plain = f"{sizes.vision} vision and {first.text} text tokens; counting {first.counting!r}; cache in {dtype}"
    table = Table(title=f"{model}: {plain}", caption="The language model alone, one prompt.", caption_justify="left")
    for name in ("kept", "vision tokens, mean over layers", "operations", "saved", "KV cache", "saved"):
        table.add_column(name, justify="right")
    table.add_row("all", str(sizes.vision), f"{first.plain_flops / 1e12:.2f} T", "", size(first.plain_bytes), "")
    for name, one in found.items():
        table.add_row(
            name, f"{one.mean_tokens:.1f}", f"{one.flops / 1e12:.2f} T", f"{one.saved:.1%}", size(one.bytes),
            f"{one.saved_bytes:.1%}",
        )  # fmt: skip
    return table


def _headline_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Published: 88.5% fewer operations, without a setting or a way of counting",
        caption="The number kept is that of every layer; the published text names neither setting nor counting.",
        caption_justify="left",
    )
    for name in ("model", "kept", "text tokens", *COUNTINGS):
        table.add_column(name, justify="right")
    for row in rows[:: len(COUNTINGS)]:
        same = [one for one in rows if all(one[name] == row[name] for name in ("model", "text"))]
        total = MODELS[row["model"]].vision
        table.add_row(
            row["model"], f"{row['kept']} of {total}", str(row["text"]), *(f"{one['saved']:.1%}" for one in same)
        )
    return table
