# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files: an interrupt, a crash or a full disk leaves the previous file. Reading of JSON documents."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix, to write to; replaces `path` at the end of the block.
    Missing folders are created.

    If the block raises, also KeyboardInterrupt, `path` does not change and no other file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # mkstemp gives permissions to the owner only
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """``written_whole`` for a folder, which replaces the one at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as name:
        scratch = Path(name, path.name)
        scratch.mkdir()
        yield scratch
        if path.exists():
            path.rename(Path(name, "before"))
        scratch.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_document(path: Path, kind: str | tuple[str, ...], maker: str) -> dict[str, Any]:
    """Read a JSON document whose ``format`` is `kind`, or one of several; `maker` writes them.

    Raises:
        ValueError: the file is no such document.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") not in kinds:
        raise ValueError(f"{path} is not a document of {maker} ({kinds[0]})")
    return document
