# SPDX-License-Identifier: Apache-2.0
"""MustDrop itself, with fixed budgets at this model's depth, and its presets."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...config import MustDropConfig
from .base import Method, Sizes
from .schedules import Unreachable, falling, scaled

_PUBLISHED_LAYERS = (2, 6, 10, 14)
# Windows of nine that merge, of 64: those of the presets "budget-192", "budget-128" and "budget-64".
_WINDOWS = {192: 32, 128: 40, 64: 56}


def mustdrop(sizes: Sizes, average: float, **changes: Any) -> Method:
    """MustDrop (arXiv 2411.10803) with fixed counts: the presets "budget-*" at another depth.

    Departs: windows merge by rank and tokens drop by rank, so that the number is met exactly; positions stay those of
    the plain prompt.
    """
    windows = _WINDOWS.get(int(average), 60 if average < 64 else 32) * sizes.patches // 576
    return _with(sizes, average, windows, scaled(_PUBLISHED_LAYERS, sizes.depth), 0.08, **changes)


def renumbered(sizes: Sizes, average: float) -> Method:
    """``mustdrop`` with the published positions, renumbered after every cut."""
    return mustdrop(sizes, average, positions="published")


def _with(
    sizes: Sizes, average: float, windows: int, layers: tuple[int, ...], key_rate: float, **changes: Any
) -> Method:
    start = sizes.patches - 8 * windows
    budgets = falling(start, layers, sizes.depth, average)
    config = MustDropConfig(merge_budget=windows, pruning_layers=layers, budgets=budgets, key_rate=key_rate)
    return Method(dataclasses.replace(config, **changes))


def preset(sizes: Sizes, name: str) -> Method:
    """A preset as it is, its pruning layers at this model's depth."""
    config = MustDropConfig.preset(name)
    layers = scaled(config.pruning_layers, sizes.depth)
    if config.budgets is not None and len(layers) < len(config.budgets):
        raise Unreachable(f"the model has too few layers for preset {name}")
    return Method(dataclasses.replace(config, pruning_layers=layers))
