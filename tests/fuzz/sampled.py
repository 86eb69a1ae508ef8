# SPDX-License-Identifier: Apache-2.0
"""Default family of an operator: its sample call with other values in other layouts.

The reference backend replaces the oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases import in_buffer
from torch import Tensor

import mustdrop_kernels
from mustdrop_kernels.ops.contract import CONTRACTS
from mustdrop_kernels.ops.samples import outcome, sample

from .family import Family
from .inputs import FLOATS, SEEDS, Case, dtype_of, numbers


def sampled(op: str) -> Family:
    """Family of an operator, built from its sample call."""

    def build(case: Case) -> dict[str, Any]:
        arguments = sample(op, dtype=dtype_of(case["dtype"]))
        draw = numbers(case["seed"])

        def vary(t: Tensor) -> Tensor:
            """Permute the rows and return a view of a larger buffer."""
            if t.dim() == 0:
                return t
            t = t[torch.from_numpy(draw.permutation(t.shape[0]))]
            return in_buffer(t, [*draw.permutation(t.dim() - 1).tolist(), t.dim() - 1]) if draw.random() < 0.5 else t

        return {name: vary(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}

    def check(case: Case, arguments: dict[str, Any], memo: dict[str, Any], tensors: list[Tensor]) -> bool:
        expected = getattr(mustdrop_kernels, op)(**build(case), backend="reference")
        for wanted, found in zip(outcome(op, arguments, expected).values(), tensors, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        return False

    if CONTRACTS[op].writes:
        raise TypeError(f"{op} changes its arguments: write a family for it")
    return Family(op, st.fixed_dictionaries({"dtype": FLOATS, "seed": SEEDS}), build, check)
