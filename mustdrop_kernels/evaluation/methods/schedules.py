# SPDX-License-Identifier: Apache-2.0
"""Schedules: tokens kept after each pruning layer, so that all methods process the same number on average over layers.

Papers name a setting by that average. A method that keeps all tokens in its first layers must keep fewer later; if its
first layers alone exceed the average, the setting does not exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

PUBLISHED_DEPTH = 32
"""Layers of the model that the published layer numbers are for."""


class Unreachable(ValueError):
    """A method cannot keep so few tokens."""


def scaled(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Published pruning layers, from 0, at the same relative depth of another model; at least one layer has all tokens.

    Layers that coincide are listed once.
    """
    ends = (max(1, round((layer + 1) * depth / PUBLISHED_DEPTH)) for layer in layers)
    return tuple(dict.fromkeys(end - 1 for end in ends))


def shaped(start: int, layers: Sequence[int], depth: int, average: float, shape: Sequence[float]) -> tuple[int, ...]:
    """Budgets after each of `layers`, in proportion to `shape`, that bring the mean over `depth` layers to `average`.

    No budget is above `start`. Budgets are rounded down and the remainder is added to the last ones, so that the mean
    is at most `average`.

    Raises:
        Unreachable: the layers before the first cut alone exceed the average.
    """
    lengths = [end - begin for begin, end in itertools.pairwise([*(layer + 1 for layer in layers), depth])]
    before = start * (layers[0] + 1)
    left = int(average * depth) - before
    if left < sum(lengths):
        raise Unreachable(f"{start} tokens in {layers[0] + 1} of {depth} layers leave none for the others")

    def budgets(factor: float) -> list[int]:
        return [max(1, min(start, int(factor * part + 1e-9))) for part in shape]

    def cost(found: Sequence[int]) -> int:
        return sum(budget * length for budget, length in zip(found, lengths, strict=True))

    low, high = 0.0, start / min(shape)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(budgets(middle)) <= left else (low, middle)
    found = budgets(low)
    for i in reversed(range(len(found))):
        most = found[i - 1] if i else start
        found[i] = min(most, found[i] + max(0, left - cost(found)) // lengths[i])
    return tuple(found)
