# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer on the backends of this process; `make fuzz` runs longer, on more backends.

MUSTDROP_FUZZ_CASES: cases per operator.
"""

from __future__ import annotations

import os

import cuda_emulation
import pytest
from ops.schemas import OPS

from mustdrop_kernels import backends
from mustdrop_kernels.ops import registry

from .families import FAMILIES
from .runners import Here
from .search import search

CASES = int(os.environ.get("MUSTDROP_FUZZ_CASES", "100"))
SEED = int(os.environ.get("MUSTDROP_FUZZ_SEED", "1"))


@pytest.mark.parametrize("op", OPS)
def test_every_backend_agrees_with_the_oracle(op, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # the emulation registers itself
    runners = [Here("cpu"), Here("reference")]
    if cuda_emulation.emulated().why_not(op, "cpu") is None:
        runners.append(Here(cuda_emulation.NAME, share=0.05))
    tally = search(FAMILIES[op], runners, CASES, SEED)
    assert not tally.failures, "\n".join(f"{f.message}\n  {f.case}" for f in tally.failures)
    assert tally.cases == tally.by_runner["cpu"] == tally.by_runner["reference"] == CASES
    assert sum(tally.near.values()) <= 0.2 * CASES * len(runners), "too many cases are near a threshold"


@pytest.mark.parametrize("op", OPS)
def test_triton_interpreted(op):
    """Slow, so of few cases; `make fuzz` runs more."""
    if reason := backends.get("triton").why_not(op, "cpu"):
        pytest.skip(reason)
    tally = search(FAMILIES[op], [Here("triton")], 5, SEED)
    assert not tally.failures, "\n".join(f"{f.message}\n  {f.case}" for f in tally.failures)
    assert tally.cases == tally.by_runner["triton"] == 5
