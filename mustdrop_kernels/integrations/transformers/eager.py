# SPDX-License-Identifier: Apache-2.0
"""Eager execution of compiled functions while a prompt is read, since its shapes depend on the data."""

from __future__ import annotations

import sys
from typing import Any

import torch


class EagerSwitch:
    """A switch for everything compiled by ``torch.compile``, in this thread."""

    def __init__(self) -> None:
        self._stance: Any = None

    def set(self, on: bool) -> None:
        """Runs compiled functions eagerly if `on`. Loads nothing of torch.compile that is not loaded yet."""
        if on and self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        elif not on and self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)


def wrapped_modules(model: Any) -> list[Any]:
    """The wrappers of ``torch.compile(model)``, outermost first, and the model inside."""
    found = [model]
    while hasattr(found[-1], "_orig_mod"):
        found.append(found[-1]._orig_mod)
    return found
