# SPDX-License-Identifier: Apache-2.0
"""What somebody has compiled runs as it was written while a prompt is read: its shapes are read from the data."""

from __future__ import annotations

import sys
from typing import Any

import torch


class Uncompiled:
    """A switch over everything that ``torch.compile`` has made, in this thread."""

    def __init__(self) -> None:
        self._stance: Any = None

    def set(self, on: bool) -> None:
        """On: compiled functions run uncompiled. Where nothing can have been compiled yet, nothing is loaded."""
        if on and self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        elif not on and self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)


def modules_of(model: Any) -> list[Any]:
    """The model, and what ``torch.compile(model)`` made around it."""
    found = [model]
    while hasattr(found[-1], "_orig_mod"):
        found.append(found[-1]._orig_mod)
    return found
