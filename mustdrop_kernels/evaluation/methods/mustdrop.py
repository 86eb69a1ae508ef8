# SPDX-License-Identifier: Apache-2.0
"""MustDrop itself, with fixed budgets at this model's depth, and its presets."""

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
# Chosen on the validation split: cuts after about the first layer and half of them, for few tokens after a quarter too.
_READ: dict[int, Shape] = {
    192: (8, (2, 15), (6, 1)),
    128: (24, (2, 15), (6, 1)),
    64: (40, (2, 7, 15), (100, 80, 8)),
    32: (48, (2, 7, 15), (18, 7, 1)),
}


def mustdrop(sizes: Sizes, average: float, **changes: Any) -> Method:
    """MustDrop (arXiv 2411.10803) with fixed counts: the presets "budget-*" at another depth.

    Departs: windows merge by rank and tokens drop by rank, so that the number is met exactly; positions stay those of
    the plain prompt.
    """
    return _with(sizes, average, _PUBLISHED, **changes)


def read(sizes: Sizes, average: float) -> Method:
    """MustDrop with other numbers: fewer windows merge, and tokens go where they have been read.

    The published numbers merge 56 of 64 windows for 64 tokens, more than this task's pictures have background, and
    drop little by little. Here windows with something in them stay whole, the first cut is larger, what it leaves stays
    until half of the layers have read it, and then nearly all goes. No key tokens: they would stay to the end.
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
