# SPDX-License-Identifier: Apache-2.0
"""Deferred imports, for backends whose kernel modules take seconds to import."""

from __future__ import annotations

from collections.abc import Callable


def when_called(find: Callable[[], Callable[..., object]]) -> Callable[..., object]:
    """Wrap ``find``: the first call resolves the function that it returns and caches it."""
    found: Callable[..., object] | None = None

    def call(*args: object, **kwargs: object) -> object:
        nonlocal found
        if found is None:
            found = find()
        return found(*args, **kwargs)

    return call
