# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk, and JSON that the command writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
from click.testing import Result


@pytest.fixture(scope="session")
def as_json() -> Callable[[Result], Any]:
    """Standard output, all of it, as one JSON document."""
    return lambda result: json.loads(result.stdout)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved LLaVA with 8 language layers and pictures of 12x12 patches."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava.model().save_pretrained(folder)
    tiny_llava.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture file whose right half is flat."""
    path = tmp_path_factory.mktemp("pictures") / "half_flat.png"
    tiny_llava.picture().save(path)
    return path
