# SPDX-License-Identifier: Apache-2.0
"""Tolerances against the float64 oracle. Decisions (merge, keep) have none.

Probabilities. A score s = scale * q.k is a float32 sum over head_dim with an error of about
sqrt(D) * 6e-8 * |q||k| * scale, below 3e-6 for the sizes tested (|s| up to about 15). exp turns this absolute error
into a relative one of the same size; the normalizer adds as much; the mean over heads and the sum over rows have
positive terms only and add a negligible error. 2e-5 relative leaves a factor of three; 1e-6 absolute covers values far
below the uniform share 1 / L. Half-precision inputs are exact in float32 and the outputs are float32, so they have the
same tolerance: a backend that rounds q.k fails.

Merged tokens. A float32 weighted mean of n <= 32 terms has an error of at most 4e-6 times the mean of the |terms|; it
is then rounded once, by half a unit in the last place of the dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PROBABILITY = {"rtol": 2e-5, "atol": 1e-6}
MEAN_RTOL = 4e-6


def assert_probabilities(got: Tensor, want: np.ndarray, what: str = "") -> None:
    assert got.dtype == torch.float32, f"{what} must be float32, is {got.dtype}"
    assert tuple(got.shape) == want.shape, f"{what} has shape {tuple(got.shape)}, must be {want.shape}"
    got64 = got.detach().cpu().to(torch.float64).numpy()
    np.testing.assert_allclose(got64, want, **PROBABILITY, equal_nan=True, err_msg=what)
    zeros = want == 0
    assert (got64[zeros] == 0).all(), f"{what}: columns without attention or of other types must be exactly zero"


def assert_scores(got: Any, total: np.ndarray, peak: np.ndarray) -> None:
    """The results of a scoring operator."""
    assert_probabilities(got.total, total, "total")
    assert_probabilities(got.peak, peak, "peak")


def assert_rounded_once(got: Tensor, want: np.ndarray, magnitude: np.ndarray, what: str = "") -> None:
    """`want`: float64; `magnitude`: the mean of the absolute values of its terms."""
    info = torch.finfo(got.dtype)
    error = np.abs(got.detach().cpu().to(torch.float64).numpy() - want)
    half_ulp = np.maximum(np.abs(want), info.smallest_normal) * info.eps / 2
    allowed = half_ulp * (1 + 1e-3) + MEAN_RTOL * magnitude
    worst = np.max(error - allowed, initial=-np.inf)
    assert worst <= 0, f"{what}: {worst} beyond one rounding to {got.dtype}"
