# SPDX-License-Identifier: Apache-2.0
"""Attributes of objects, set for a while."""

from __future__ import annotations

import contextlib
from typing import Any


def patch(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Sets an attribute of an object; the stack puts back what the object itself had, or nothing."""
    own = vars(target)
    if name in own:
        stack.callback(setattr, target, name, own[name])
    else:
        stack.callback(delattr, target, name)
    setattr(target, name, value)
