# SPDX-License-Identifier: Apache-2.0
"""The vision tower's output, computed once per batch for all methods that do not change the tower."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import nn


class SharedTower:
    """Cache of a tower's forward pass.

    Attributes:
        seconds: time of the last plain run, which a run that reuses its output adds to its own.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.seconds = 0.0
        self.spared = False
        self._output: Any = None

    def next_batch(self) -> None:
        """Drops the cached output."""
        self._output = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Context in which the tower runs at most once per batch; then `spared` is true if its output was reused."""
        forward, self.spared = self.tower.forward, self._output is not None

        def once(*args: Any, **kwargs: Any) -> Any:
            if self._output is None:
                begin = time.perf_counter()
                self._output = forward(*args, **with_states(kwargs))
                self.seconds = time.perf_counter() - begin
            return self._output

        self.tower.forward = once
        try:
            yield
        finally:
            del self.tower.forward


def with_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A tower's arguments, with the hidden states of all layers as output."""
    return {**kwargs, "output_hidden_states": True}
