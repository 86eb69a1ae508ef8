# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, their checks, and the end of a command that refuses them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from ..errors import Refusal

# Of measurements:
Json = Annotated[Path | None, typer.Option("--json", help="Write the document to this file.")]
Load = Annotated[Path | None, typer.Option(help="Show this document instead of measuring anything.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table instead of tables for a console.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be measured, its memory and its time.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: torch's.")]

# Of commands that run a model:
Prompt = Annotated[str | None, typer.Option(help="The question about it. Default: one that fits it.")]
Backend = Annotated[str | None, typer.Option(help="Name of a backend. Default: the one that serves the device.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of the answers.")]
Seed = Annotated[int, typer.Option(min=0, help="Number of the made picture and question.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Context in which invalid options and missing packages end the command with one sentence and status 2."""
    try:
        yield
    except ImportError as error:
        refuse(f"{error}; pip install 'mustdrop_kernels[transformers,triton]' has what the models and kernels need")
    except typer.Exit:  # a RuntimeError
        raise
    except (Refusal, ValueError, OSError, RuntimeError) as error:
        refuse(str(error))


def refuse(reason: str) -> NoReturn:
    """End the command with status 2."""
    print(f"mustdrop: {reason}", file=sys.stderr)
    raise typer.Exit(2) from None


def check_device(device: str, used: bool = True) -> None:
    """Raise ``ValueError`` for an unknown device, or for an absent one that is to be used."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if used and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
