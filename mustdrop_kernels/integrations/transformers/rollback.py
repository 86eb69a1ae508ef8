# SPDX-License-Identifier: Apache-2.0
"""Rollback of the caller's cache after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .shortened_cache import ShortenedCache


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
