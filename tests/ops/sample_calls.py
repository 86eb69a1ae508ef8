# SPDX-License-Identifier: Apache-2.0
"""Sample call of each op, the base of the tests of argument checks, opcheck and gradients."""

from __future__ import annotations

from typing import Any

import torch

from mustdrop_kernels.ops.samples import sample

__all__ = ["deciding", "sample", "tensors_in"]


def deciding(op: str) -> tuple[str, ...]:
    """The arguments whose device is that of the call."""
    if op == "compact_paged_kv_":
        return "keys", "block_table"
    return (next(name for name, value in sample(op).items() if isinstance(value, (torch.Tensor, list))),)


def tensors_in(arguments: dict[str, Any]) -> list[torch.Tensor]:
    flat = []
    for value in arguments.values():
        flat += [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [t for t in flat if isinstance(t, torch.Tensor)]
