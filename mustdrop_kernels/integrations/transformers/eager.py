# SPDX-License-Identifier: Apache-2.0
"""Eager execution of compiled functions while a prompt is read, since its shapes depend on the data."""

from __future__ import annotations

import sys
from typing import Any

import torch


class EagerSwitch:
    """A switch for everything compiled by ``torch.compile``."""

    def __init__(self) -> None:
        self.on = False
        """Compiled functions run eagerly."""
        self._stance: Any = None

    def set(self, on: bool) -> None:
        """Runs compiled functions eagerly if `on`. Loads nothing of torch.compile that is not loaded yet."""
        if on and self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
            self.on = True
        elif not on and self._stance is not None:
            stance, self._stance, self.on = self._stance, None, False
            stance.__exit__(None, None, None)
