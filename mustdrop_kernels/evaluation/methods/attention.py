# SPDX-License-Identifier: Apache-2.0
"""Methods that drop by what the text looks at, inside the language model: stage 2 with other settings."""

from __future__ import annotations

from ...config import MustDropConfig
from .base import Method, Sizes
from .schedules import falling, scaled


def _dropping(sizes: Sizes, layers: tuple[int, ...], average: float, votes: str) -> Method:
    budgets = falling(sizes.patches, layers, sizes.depth, average)
    return Method(
        MustDropConfig(merge=False, key_rate=0.0, pruning_layers=layers, budgets=budgets, votes=votes, evict=False)
    )


def fastv(sizes: Sizes, average: float) -> Method:
    """FastV (arXiv 2403.06764): one cut after an early layer, by the attention of the prompt's last token.

    Departs: the layer is the published K = 2 of 32 at this model's depth, at least the first, so that small averages
    stay in reach.
    """
    return _dropping(sizes, scaled((1,), sizes.depth), average, "last")


def sparsevlm(sizes: Sizes, average: float) -> Method:
    """SparseVLM (arXiv 2410.04417): cuts after layers 2, 6 and 15 of 32, by the attention of the text.

    Departs: all text after the image rates, not only the words that resemble the picture; fixed budgets instead of the
    rank of the attention matrix; dropped tokens are not recycled into aggregates.
    """
    return _dropping(sizes, scaled((2, 6, 15), sizes.depth), average, "after_image")


def pyramiddrop(sizes: Sizes, average: float) -> Method:
    """PyramidDrop (arXiv 2410.17247): four equal stages, each keeping one share, by the attention of the last token.

    Departs: where the published layers 8, 16 and 24 of 32 cannot reach the average at half the tokens a stage, the
    ratio falls first, and below what that reaches the first cut moves to the first layer.
    """
    layers = scaled((7, 15, 23), sizes.depth)
    if (layers[0] + 1) * sizes.patches > 0.9 * average * sizes.depth:
        layers = (0, *layers[:-1])
    return _dropping(sizes, layers, average, "last")


def all_after(layer: int) -> Method:
    """Every vision token goes after this layer: what is read by then is all that the answer can use."""
    return Method(MustDropConfig(merge=False, key_rate=0.0, pruning_layers=(layer,), budgets=(0,), evict=False))
