# SPDX-License-Identifier: Apache-2.0
"""The cache of a prompt or of a pass, as a ``DropCache`` or a ``DropStaticCache``."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, StaticCache

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

    A ``DynamicCache`` of the caller, empty or with text, becomes a ``DropCache``: the same object.

    Raises:
        TypeError: tokens cannot be dropped from the given cache.
        ValueError: some layers of the cache hold less than all tokens, or it is offloaded.
    """
    if given is None:
        return DropCache(config)
    if isinstance(given, ShortenedCache):
        return given
    if isinstance(given, StaticCache):
        return DropStaticCache(given)
    if type(given) is DynamicCache:
        return DropCache.adopt(given, config)
    raise TypeError(
        f"{CACHE} is a {type(given).__name__}, from which drop_tokens cannot drop tokens; pass a DynamicCache, a "
        "StaticCache, or none"
    )
