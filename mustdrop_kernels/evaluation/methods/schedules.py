# SPDX-License-Identifier: Apache-2.0
"""How many tokens to keep after which layer, so that all methods process the same number on average over the layers.

Papers name a setting by that average. A method that sees all tokens in its first layers has to make up for it later;
where its first layers alone cost more than the average allows, there is no such setting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

PUBLISHED_DEPTH = 32
"""Layers of the model that the published layer numbers are for."""


class Unreachable(ValueError):
    """A method cannot keep so few tokens."""


def scaled(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Published pruning layers, from 0, at the same relative depth of another model; at least one layer sees all.

    Layers that fall together are one.
    """
    ends = (max(1, round((layer + 1) * depth / PUBLISHED_DEPTH)) for layer in layers)
    return tuple(dict.fromkeys(end - 1 for end in ends))


def falling(start: int, layers: Sequence[int], depth: int, average: float) -> tuple[int, ...]:
    """Budgets after each of `layers` that fall by one ratio and bring the mean over `depth` layers to `average`.

    Rounded down, and what is left goes to the last ones, so that the mean is never above `average`.

    Raises:
        Unreachable: the layers before the first cut are too many already.
    """
    total = int(average * depth)
    lengths = [end - begin for begin, end in itertools.pairwise([*(layer + 1 for layer in layers), depth])]
    left = total - start * (layers[0] + 1) if layers else 0
    if left < sum(lengths):
        raise Unreachable(
            f"{start} tokens in {layers[0] + 1} of {depth} layers are more than {average:g} on average"
            if layers
            else "there is no layer to cut after"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        if sum(start * ratio ** (i + 1) * n for i, n in enumerate(lengths)) > left:
            high = ratio
        else:
            low = ratio
    budgets = [max(1, int(start * low ** (i + 1) + 1e-9)) for i in range(len(lengths))]
    for i in reversed(range(len(lengths))):
        spare = left - sum(b * n for b, n in zip(budgets, lengths, strict=True))
        most = budgets[i - 1] if i else start
        budgets[i] = min(most, budgets[i] + max(0, spare) // lengths[i])
    return tuple(budgets)
