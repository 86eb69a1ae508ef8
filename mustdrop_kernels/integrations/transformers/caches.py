# SPDX-License-Identifier: Apache-2.0
"""The cache of a prompt or of a pass, as a ``DropCache`` or a ``DropStaticCache``."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import StaticCache

from .cache import DropCache
from .compat import CACHE
from .shortened_cache import ShortenedCache
from .static_cache import DropStaticCache, DropStaticLayer


def as_drop_cache(cache: Any) -> Any:
    """The cache itself, or a ``DropStaticCache`` around a ``StaticCache`` whose layers have been replaced."""
    replaced = isinstance(cache, StaticCache) and isinstance(cache.layers[0], DropStaticLayer)
    return DropStaticCache(cache) if replaced and not isinstance(cache, DropStaticCache) else cache


def cache_for_prompt(config: Any, given: Any) -> Any:  # config of the language model
    """A cache for a prompt: the caller's, if tokens can be dropped from it, or a new one if none is given.

    Raises:
        TypeError: tokens cannot be dropped from the given cache.
    """
    if given is None:
        return DropCache(config)
    if isinstance(given, StaticCache) and not isinstance(given, DropStaticCache):
        return DropStaticCache(given)
    if not isinstance(given, ShortenedCache):
        raise TypeError(
            f"{CACHE} is a {type(given).__name__}; inside drop_tokens pass none, a StaticCache, or one that generate "
            "returned inside drop_tokens"
        )
    return given
