# SPDX-License-Identifier: Apache-2.0
"""Methods that drop by text-to-vision attention inside the language model: stage 2 with other settings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ...config import MustDropConfig
from .base import Method, Sizes
from .schedules import Unreachable, scaled, shaped

# Tokens of 576 after each cut, by average, in SparseVLM's settings for LLaVA-1.5.
_SPARSEVLM = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


def _dropping(
    sizes: Sizes, layers: tuple[int, ...], average: float, shape: Sequence[float], text_queries: str
) -> Method:
    budgets = shaped(sizes.patches, layers, sizes.depth, average, shape[: len(layers)])
    return Method(
        MustDropConfig(
            merge=False, key_rate=0.0, pruning_layers=layers, budgets=budgets, text_queries=text_queries, evict=False
        )
    )


def fastv(sizes: Sizes, average: float) -> Method:
    """FastV (arXiv 2403.06764): one cut after an early layer, by the attention of the prompt's last token.

    Differences: the layer is the last of the first three after which at least 32 tokens remain, else the first; this
    was best on the validation split. The published K = 2 of 32 is too expensive for small averages in a shallow model.
    """
    for layer in (2, 1, 0):
        with contextlib.suppress(Unreachable):
            method = _dropping(sizes, (layer,), average, (1,), "last")
            if layer == 0 or (method.config.budgets or (0,))[0] >= 32:
                return method
    raise Unreachable(f"{sizes.patches} tokens in 1 of {sizes.depth} layers leave none for the others")


def sparsevlm(sizes: Sizes, average: float) -> Method:
    """SparseVLM (arXiv 2410.04417): cuts after layers 2, 6 and 15 of 32, by the attention of the text.

    Differences: all text after the image scores, not only the words that resemble the picture; counts are proportional
    to the published ones and do not follow the rank of the attention matrix; dropped tokens are not recycled.
    """
    shape = next((_SPARSEVLM[budget] for budget in _SPARSEVLM if average >= budget), _SPARSEVLM[64])
    return _dropping(sizes, scaled((2, 6, 15), sizes.depth), average, shape, "after_image")


def pyramiddrop(sizes: Sizes, average: float) -> Method:
    """PyramidDrop (arXiv 2410.17247): four equal stages, each of half the tokens, by the attention of the last token.

    Differences: the first cut is as large as the average requires, the later ones halve; if that does not suffice at
    the published layers (8, 16 and 24 of 32), the first cut moves to the first layer.
    """
    layers = scaled((7, 15, 23), sizes.depth)
    if (layers[0] + 1) * sizes.patches > 0.8 * average * sizes.depth:
        layers = (0, *layers[:-1])
    return _dropping(sizes, layers, average, (4, 2, 1), "last")


def all_after(layer: int) -> Method:
    """All vision tokens are dropped after this layer, so the answer depends on what the text has read by then."""
    return Method(MustDropConfig(merge=False, key_rate=0.0, pruning_layers=(layer,), budgets=(0,), evict=False))
