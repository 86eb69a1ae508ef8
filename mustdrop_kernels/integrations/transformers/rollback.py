# SPDX-License-Identifier: Apache-2.0
"""Rollback of the caller's cache after an error."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .caches import as_drop_cache
from .shortened_cache import Checkpoint, ShortenedCache


@contextlib.contextmanager
def rollback_on_error(cache: Any) -> Iterator[None]:
    """Removes what the block appended to a cache if it raises."""
    checkpoint = cache.checkpoint() if isinstance(cache, ShortenedCache) else None
    try:
        yield
    except BaseException:
        if checkpoint is not None:
            cache.restore(checkpoint)
        raise


class ForwardRollback:
    """The same for a model's forward pass, by hooks; the second one always runs, after an error too."""

    def __init__(self) -> None:
        self._begun: tuple[Any, Checkpoint] | None = None

    def install(self, stack: contextlib.ExitStack, model: nn.Module, after: Callable[[bool], None]) -> None:
        """Adds the hooks; the stack removes them. `after` gets True if the pass has succeeded."""
        ended = functools.partial(self._after, after)
        stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(ended, always_call=True).remove)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        cache = as_drop_cache(next((given for given in kwargs.values() if isinstance(given, Cache)), None))
        self._begun = (cache, cache.checkpoint()) if isinstance(cache, ShortenedCache) else None

    def _after(self, after: Callable[[bool], None], module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        begun, self._begun = self._begun, None
        if output is None and begun is not None:  # it raised
            cache, checkpoint = begun
            cache.restore(checkpoint)
        after(output is not None)
