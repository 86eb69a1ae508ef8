# SPDX-License-Identifier: Apache-2.0
"""Measurements of ``mustdrop bench``: operators beside baselines, decode steps, host code, whole models, serving."""

from __future__ import annotations

from .baselines import Baseline, baselines_of
from .cases import CASES, Case, Inputs
from .shapes import Shape, parse_shapes

__all__ = ["CASES", "Baseline", "Case", "Inputs", "Shape", "baselines_of", "parse_shapes"]
