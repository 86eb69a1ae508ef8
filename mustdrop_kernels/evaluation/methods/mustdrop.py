# SPDX-License-Identifier: Apache-2.0
"""MustDrop itself, with fixed budgets at this model's depth, and its presets."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...config import MustDropConfig
from .base import Method, Sizes
from .schedules import Unreachable, scaled, shaped

_LAYERS = MustDropConfig().pruning_layers

# Of each "budget-*" preset: windows of nine that merge, of 64, and the tokens after each cut.
_SHAPES = {192: (32, (272, 228, 184, 144)), 128: (40, (200, 164, 128, 80)), 64: (56, (108, 82, 56, 40))}


def mustdrop(sizes: Sizes, average: float, **changes: Any) -> Method:
    """MustDrop (arXiv 2411.10803) with fixed counts: the presets "budget-*" at another depth.

    Departs: windows merge by rank and tokens drop by rank, so that the number is met exactly; positions stay those of
    the plain prompt.
    """
    windows, shape = next((_SHAPES[budget] for budget in _SHAPES if average >= budget), _SHAPES[64])
    layers = scaled(_LAYERS, sizes.depth)
    return _with(sizes, average, windows, layers, shape, **changes)


def renumbered(sizes: Sizes, average: float) -> Method:
    """``mustdrop`` with the published positions, renumbered after every cut."""
    return mustdrop(sizes, average, positions="published")


def _with(
    sizes: Sizes, average: float, windows: int, layers: tuple[int, ...], shape: tuple[int, ...], **changes: Any
) -> Method:
    windows = windows * sizes.patches // 576
    budgets = shaped(sizes.patches - 8 * windows, layers, sizes.depth, average, shape[-len(layers) :])
    config = MustDropConfig(merge_budget=windows, pruning_layers=layers, budgets=budgets)
    return Method(dataclasses.replace(config, **changes))


def preset(sizes: Sizes, name: str) -> Method:
    """A preset as it is, its pruning layers at this model's depth."""
    config = MustDropConfig.preset(name)
    layers = scaled(config.pruning_layers, sizes.depth)
    if config.budgets is not None and len(layers) < len(config.budgets):
        raise Unreachable(f"the model has too few layers for preset {name}")
    return Method(dataclasses.replace(config, pruning_layers=layers))
