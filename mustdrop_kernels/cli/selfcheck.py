# SPDX-License-Identifier: Apache-2.0
"""The sample call of each operator, run on every backend that serves it and compared with the reference backend."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .. import backends, ops
from ..ops.samples import outcome, sample

YARDSTICK = "reference"
_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 results; a wrong kernel is off by far more


@dataclass(frozen=True)
class Check:
    """Verdict on one operator, backend and device."""

    op: str
    device: str
    backend: str
    status: str
    """"passes", "differs" or "fails"."""
    detail: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain JSON types."""
        return asdict(self)


def _run(op: str, device: str, backend: str) -> dict[str, Tensor]:
    arguments = sample(op, device)
    return outcome(op, arguments, getattr(ops, op)(**arguments, backend=backend))


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first result that differs from the reference's; None if none does."""
    for name, wanted in expected.items():
        value = found[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            return f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        if wanted.is_floating_point():
            if not torch.allclose(value, wanted, **_TOLERANCE, equal_nan=True):
                return f"{name} is off by up to {(value - wanted).abs().max().item():.2g}"
        elif wrong := int((value != wanted).sum()):
            return f"{wrong} of {wanted.numel()} entries of {name} differ"
    return None


def check(op: str, device: str, backend: str) -> Check:
    """Run one operator on one backend. Never raises: an error is part of the verdict."""
    try:
        difference = _difference(_run(op, device, backend), _run(op, device, YARDSTICK))
    except Exception as error:
        return Check(op, device, backend, "fails", f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(op, device, backend, "passes" if difference is None else "differs", difference)


def check_all(device: str) -> list[Check]:
    """Every operator on every backend that serves it on this device."""
    checks = []
    for op in backends.OPS:
        for name, backend in backends.registered().items():
            try:
                serves = backend.why_not(op, device) is None
            except Exception as error:
                checks.append(Check(op, device, name, "fails", f"why_not: {type(error).__name__}: {error}"))
                continue
            if serves and name != YARDSTICK:
                checks.append(check(op, device, name))
    return checks
