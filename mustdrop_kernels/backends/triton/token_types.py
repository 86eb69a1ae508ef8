# SPDX-License-Identifier: Apache-2.0
"""``TokenType`` in kernels. The numbers are literals: a called function reads no variable (see numbers.py)."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it beside each function)


@triton.jit
def is_token(kind):
    """Whether a position is no padding."""
    return kind != 0


@triton.jit
def is_vision(kind):
    """Whether a position is a vision token."""
    return kind == 2


@triton.jit
def is_query(kind):
    """Whether a position is a text query."""
    return kind == 3
