# SPDX-License-Identifier: Apache-2.0
"""Attributes of objects that are replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_ABSENT = object()  # the object has no attribute of its own


class Patches:
    """Replaced attributes of objects. One that was replaced once more since is left alone."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, str, Any, Any]] = []  # object, name, value, the object's own value before

    def set(self, target: Any, name: str, value: Any) -> None:
        """Sets an attribute until ``restore``."""
        before = vars(target).get(name, _ABSENT)
        self._entries.append((target, name, value, before))
        _exchange(target, name, before, value)

    def restore(self) -> None:
        """Restores the objects' own attributes, the last one first."""
        while self._entries:
            target, name, value, before = self._entries[-1]
            _exchange(target, name, value, before)
            self._entries.pop()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Restores the objects' own attributes for the duration of a block."""
        for target, name, value, before in reversed(self._entries):
            _exchange(target, name, value, before)
        try:
            yield
        finally:
            for target, name, value, before in self._entries:
                _exchange(target, name, before, value)


def _exchange(target: Any, name: str, old: Any, new: Any) -> None:
    if vars(target).get(name, _ABSENT) is not old:
        return
    if new is _ABSENT:
        delattr(target, name)
    else:
        setattr(target, name, new)


def patch(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object; the stack restores the object's own attribute, or deletes it."""
    own = vars(target)
    if name in own:
        stack.callback(setattr, target, name, own[name])
    else:
        stack.callback(delattr, target, name)
    setattr(target, name, value)
