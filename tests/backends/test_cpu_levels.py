# SPDX-License-Identifier: Apache-2.0
"""Conformance suite of the CPU kernels on each instruction set of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import output_of_python

from mustdrop_kernels import _load

REPOSITORY = Path(__file__).parents[2]
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
"""In ascending order."""
COMPILED = ("golden", "spatial_merge", "cls_attention", "select", "text_vision_scores", "text_vision_packed")
"""Tests of operators whose kernels are compiled per level."""
FEW = {"MUSTDROP_TEST_BACKENDS": "cpu", "MUSTDROP_FUZZ_CASES": "25"}


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_conformance(level: str) -> None:
    best = _load.cpu_capability()
    if best not in LEVELS or LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this machine has {best}")
    if level == best:
        pytest.skip("the main suite runs on it")
    files = [*(f"tests/ops/test_{name}.py" for name in COMPILED), "tests/fuzz/test_fuzz.py"]
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files)
    assert " passed" in output_of_python(*words, folder=REPOSITORY, MUSTDROP_CPU_CAPABILITY=level, **FEW)
