# SPDX-License-Identifier: Apache-2.0
"""The compared methods, as configurations of this package's stages and operators."""

from __future__ import annotations

from collections.abc import Callable

from .. import FULL
from . import attention, mustdrop, selection, tome
from .base import NOTHING, Method, Sizes
from .schedules import Unreachable

METHODS: dict[str, Callable[[Sizes, float], Method]] = {
    "random": selection.random,
    "fastv": attention.fastv,
    "sparsevlm": attention.sparsevlm,
    "pyramiddrop": attention.pyramiddrop,
    "tome": tome.tome,
    "prumerge": selection.prumerge,
    "visionzip": selection.visionzip,
    "cls": selection.cls_top,
    "mustdrop": mustdrop.mustdrop,
    "mustdrop-read": mustdrop.read,
    "mustdrop-renumbered": mustdrop.renumbered,
}

__all__ = ["FULL", "METHODS", "NOTHING", "Method", "Sizes", "Unreachable", "make"]


def make(name: str, budget: float | None, sizes: Sizes) -> Method:
    """The method of this name that keeps `budget` tokens on average over the layers.

    Besides ``METHODS`` there are "full", "after-K" (every vision token goes after layer K) and "preset-NAME" (one of
    ``MustDropConfig.presets()``), which take no budget.

    Raises:
        Unreachable: the method cannot keep so few tokens.
        ValueError: there is no such method.
    """
    if name == FULL:
        return Method(NOTHING)
    kind, _, rest = name.partition("-")
    if kind == "after" and rest.isdigit():
        return attention.all_after(int(rest))
    if kind == "preset":
        return mustdrop.preset(sizes, rest)
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {FULL}, {', '.join(METHODS)}, after-K, preset-NAME")
    if budget is None:
        raise ValueError(f"{name} needs a budget")
    return METHODS[name](sizes, budget)
