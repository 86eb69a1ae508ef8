# SPDX-License-Identifier: Apache-2.0
"""An error in the middle leaves a cache that the caller has handed over as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .cache import DropCache, Mark


@contextlib.contextmanager
def undone_on_error(cache: Any) -> Iterator[None]:
    """Where the block raises, what it appended to a ``DropCache`` is taken off."""
    mark = cache.mark() if isinstance(cache, DropCache) else None
    try:
        yield
    except BaseException:
        if mark is not None:
            cache.back_to(mark)
        raise


class UndoneForward:
    """The same for a model's forward pass, with hooks: torch calls the second one whatever has happened."""

    def __init__(self) -> None:
        self._begun: tuple[DropCache, Mark] | None = None

    def install(self, stack: contextlib.ExitStack, model: nn.Module) -> None:
        """Adds the hooks; the stack takes them away."""
        stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(self._after, always_call=True).remove)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = next((given for given in kwargs.values() if isinstance(given, DropCache)), None)
        self._begun = None if cache is None else (cache, cache.mark())

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        begun, self._begun = self._begun, None
        if output is None and begun is not None:  # it raised
            cache, mark = begun
            cache.back_to(mark)
