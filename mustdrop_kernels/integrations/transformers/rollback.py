# SPDX-License-Identifier: Apache-2.0
"""An error in the middle leaves a cache that the caller has handed over as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .shortened_cache import Mark, Shortened
from .static_cache import books_of


@contextlib.contextmanager
def undone_on_error(cache: Any) -> Iterator[None]:
    """Where the block raises, what it appended to a ``DropCache`` is taken off."""
    mark = cache.mark() if isinstance(cache, Shortened) else None
    try:
        yield
    except BaseException:
        if mark is not None:
            cache.back_to(mark)
        raise


class UndoneForward:
    """The same for a model's forward pass, with hooks: torch calls the second one whatever has happened."""

    def __init__(self) -> None:
        self._begun: tuple[Any, Mark] | None = None

    def install(self, stack: contextlib.ExitStack, model: nn.Module, after: Callable[[bool], None]) -> None:
        """Adds the hooks; the stack takes them away. `after` is told whether the pass went well."""
        ended = functools.partial(self._ended, after)
        stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(ended, always_call=True).remove)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        cache = books_of(next((given for given in kwargs.values() if isinstance(given, Cache)), None))
        self._begun = (cache, cache.mark()) if isinstance(cache, Shortened) else None

    def _ended(self, after: Callable[[bool], None], module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        begun, self._begun = self._begun, None
        if output is None and begun is not None:  # it raised
            cache, mark = begun
            cache.back_to(mark)
        after(output is not None)
