# SPDX-License-Identifier: Apache-2.0
"""Temporary attributes of objects."""

from __future__ import annotations

import contextlib
from typing import Any


def patch(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object; the stack restores the object's own attribute, or deletes it."""
    own = vars(target)
    if name in own:
        stack.callback(setattr, target, name, own[name])
    else:
        stack.callback(delattr, target, name)
    setattr(target, name, value)
