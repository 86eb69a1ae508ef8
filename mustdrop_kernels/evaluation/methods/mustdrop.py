# SPDX-License-Identifier: Apache-2.0
"""MustDrop with fixed budgets at this model's depth, and its presets."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...config import MustDropConfig
from .base import Method, Sizes
from .schedules import Unreachable, scaled, shaped

_LAYERS = MustDropConfig().pruning_layers

Shape = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Windows of nine that merge, of 64; layers of 32 to cut after; in what proportion to keep."""

# The presets "budget-*".
_PUBLISHED: dict[int, Shape] = {
    192: (32, _LAYERS, (272, 228, 184, 144)),
    128: (40, _LAYERS, (200, 164, 128, 80)),
    64: (56, _LAYERS, (108, 82, 56, 40)),
}
# Chosen on the validation split: cuts after the first layer and after half of them, for few tokens also a quarter.
_READ: dict[int, Shape] = {
    192: (8, (2, 15), (6, 1)),
    128: (24, (2, 15), (6, 1)),
    64: (40, (2, 7, 15), (100, 80, 8)),
    32: (48, (2, 7, 15), (18, 7, 1)),
}


def mustdrop(sizes: Sizes, average: float, **changes: Any) -> Method:
    """MustDrop (arXiv 2411.10803) with fixed counts: the presets "budget-*" at another depth.

    Differences: windows merge by rank and tokens are dropped by rank, so that the budget is exact; positions are those
    of the plain prompt.
    """
    return _with(sizes, average, _PUBLISHED, **changes)


def read(sizes: Sizes, average: float) -> Method:
    """MustDrop with other budgets: fewer windows merge, and most tokens are dropped in one late cut.

    For 64 tokens the published budgets merge 56 of 64 windows, more than the background of this task's pictures, and
    drop in small steps. Here windows with contents do not merge, the first cut is larger, its remaining tokens stay for
    half of the layers, and then nearly all are dropped. There are no key tokens, which would stay to the end.
    """
    return _with(sizes, average, _READ, key_rate=0.0)


def renumbered(sizes: Sizes, average: float) -> Method:
    """``mustdrop`` with the published positions, renumbered after every cut."""
    return mustdrop(sizes, average, positions="published")


def _with(sizes: Sizes, average: float, shapes: dict[int, Shape], **changes: Any) -> Method:
    windows, published, shape = next((shapes[budget] for budget in shapes if average >= budget), shapes[min(shapes)])
    windows, layers = windows * sizes.patches // 576, scaled(published, sizes.depth)
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
