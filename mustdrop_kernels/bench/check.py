# SPDX-License-Identifier: Apache-2.0
"""Comparison of the results of an operator and a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Canonical, Case

# Means are rounded once by us; baselines may round terms and sums.
_MEANS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Baselines that compute in half precision round q K^T before the softmax: an error of 2^-9 of a score of 8 in bfloat16.
_PROBABILITIES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# Share of decisions that such an error may change: tokens whose score lies next to a threshold.
_DECISIONS = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def _tolerance(case: Case) -> float:
    if case.spec.moves:
        return 0.0
    return (_MEANS if case.op == "spatial_merge" else _PROBABILITIES)[case.dtype]


def difference(case: Case, ours: Canonical, theirs: Canonical) -> str | None:
    """Description of the first difference; None if the common results, at least one, are equal."""
    common = [name for name in theirs if name in ours]
    if not common:
        return "nothing that can be compared"
    if case.op.endswith("attention_select") and "keep" in common:
        reason = _decides_otherwise(ours["keep"], theirs["keep"], _DECISIONS[case.dtype])
        if reason is not None:
            return reason
        common = [name for name in common if name not in ("keep", "counts")]
    for name in common:
        reason = _differs(ours[name], theirs[name], _tolerance(case))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _decides_otherwise(ours: Tensor, theirs: Tensor, share: float) -> str | None:
    """Description of the difference if more than this share of the kept positions differs."""
    length = int(torch.cat([ours, theirs, ours.new_zeros(1)]).max()) + 1
    alone = int((ours.bincount(minlength=length) - theirs.bincount(minlength=length)).abs().sum())
    return f"keep: {alone} of {ours.numel()} entries differ" if alone > share * ours.numel() else None


def _differs(ours: Tensor, theirs: Tensor, tolerance: float) -> str | None:
    if ours.shape != theirs.shape:
        return f"shape {tuple(theirs.shape)}, ours is {tuple(ours.shape)}"
    if not ours.numel():
        return None
    if not ours.is_floating_point() or tolerance == 0:
        wrong = int((ours != theirs).sum())
        return f"{wrong} of {ours.numel()} entries differ" if wrong else None
    a, b = ours.double(), theirs.double()
    excess = (a - b).abs() - tolerance * (a.abs() + a.abs().mean())
    if bool((excess <= 0).all()):  # NaN does not pass
        return None
    at = int(excess.nan_to_num(nan=torch.inf).argmax())
    return f"{b.flatten()[at].item():.6g} where ours is {a.flatten()[at].item():.6g} (tolerance {tolerance:g})"
