# SPDX-License-Identifier: Apache-2.0
"""``mustdrop bench``: the operators timed beside other ways of computing the same, on one definition of the inputs."""

from __future__ import annotations

from .baselines import Baseline, baselines_of
from .cases import CASES, Case, Inputs
from .shapes import Shape, parse_shapes

__all__ = ["CASES", "Baseline", "Case", "Inputs", "Shape", "baselines_of", "parse_shapes"]
