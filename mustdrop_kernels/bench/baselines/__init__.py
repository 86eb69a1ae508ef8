# SPDX-License-Identifier: Apache-2.0
"""Baselines: other ways to compute the results of the operators, each named for its method.

A baseline is written from the formulas. It takes the operator's inputs; ``canonical`` brings its result into the form
in which it is compared with the operator's before anything is timed.
"""

from __future__ import annotations

from . import merge, moves, scores, select
from .base import Baseline, compiled

BASELINES: tuple[Baseline, ...] = (*merge.BASELINES, *scores.BASELINES, *select.BASELINES, *moves.BASELINES)


def baselines_of(op: str) -> list[Baseline]:
    """The baselines of an operator, the published algorithm first."""
    return [baseline for baseline in BASELINES if op in baseline.ops]


def names() -> list[str]:
    """All names, each once."""
    return list(dict.fromkeys(baseline.name for baseline in BASELINES))


__all__ = ["BASELINES", "Baseline", "baselines_of", "compiled", "names"]
