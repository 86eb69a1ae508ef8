# SPDX-License-Identifier: Apache-2.0
"""For backends whose kernels are behind an import that costs seconds: it happens when an operator is first called."""

from __future__ import annotations

from collections.abc import Callable


def when_called(find: Callable[[], Callable[..., object]]) -> Callable[..., object]:
    """The function that ``find`` returns, found when it is first called and kept from then on."""
    found: Callable[..., object] | None = None

    def call(*args: object, **kwargs: object) -> object:
        nonlocal found
        if found is None:
            found = find()
        return found(*args, **kwargs)

    return call
