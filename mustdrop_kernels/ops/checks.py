# SPDX-License-Identifier: Apache-2.0
"""Argument checks. ``csrc/common`` has the same conditions and messages in C++.

A failed check raises a RuntimeError that names the operator, the argument, its requirement and its value. Sizes may be
symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Call

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Checker:
    """Argument checks of one call of an operator."""

    def __init__(self, call: Call, like: Tensor) -> None:
        """``like``: the tensor whose device the others must share."""
        self.op, self.device = call.op, like.device

    def __call__(self, ok: bool, argument: str, message: str) -> None:
        """Refuse ``argument`` unless ``ok``."""
        torch._check(ok, lambda: f"mustdrop::{self.op}: {argument} {message}")

    def tensor(
        self,
        argument: str,
        t: Tensor,
        shape: Sequence[int | str],
        dtypes: Sequence[torch.dtype] | None = None,
        any_strides: bool = False,
    ) -> None:
        """Check layout, rank, known sizes (integers of ``shape``), dtype, device and the last dimension's stride."""
        self.strided(argument, t)
        text = "(" + ", ".join(map(str, shape)) + ")"
        self(t.dim() == len(shape), argument, f"must be {text}, got {tuple(t.shape)}")
        for i, size in enumerate(shape):
            if not isinstance(size, str):
                self(t.shape[i] == size, argument, f"must be {text}, got {tuple(t.shape)}")
        if dtypes is not None:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self(t.dtype in dtypes, argument, f"must be {names}, got {str(t.dtype).removeprefix('torch.')}")
        self(t.device == self.device, argument, f"must be on {self.device}, got {t.device}")
        if not any_strides and t.dim():
            self.last_contiguous(argument, t)

    def strided(self, argument: str, t: Tensor) -> None:
        """Refuse tensors without plain strided storage: sparse, nested, quantized, lazily conjugated."""
        self(isinstance(t, Tensor), argument, f"must be a Tensor, got {type(t).__name__}")
        kind = "quantized" if t.is_quantized else "nested" if t.is_nested else t.layout
        self(kind is torch.strided, argument, f"must be an ordinary strided tensor, got {kind}")
        self(not (t.is_conj() or t.is_neg()), argument, "must not be conjugated or negated lazily: resolve it first")

    def last_contiguous(self, argument: str, t: Tensor) -> None:
        """Refuse a tensor whose last dimension has gaps."""
        ok = t.stride(-1) == 1 or t.shape[-1] <= 1 or t.numel() == 0
        self(ok, argument, f"must be contiguous in its last dimension, got strides {t.stride()}")

    def at_least(self, argument: str, value: int, least: int) -> None:
        """Refuse an integer below ``least``."""
        self(value >= least, argument, f"must be at least {least}, got {value}")
