# SPDX-License-Identifier: Apache-2.0
"""Token types: the role of each position of a sequence."""

from __future__ import annotations

from enum import IntEnum


class TokenType(IntEnum):
    """Role of a position in ``token_types`` (uint8)."""

    PADDING = 0
    TEXT = 1
    VISION = 2
    QUERY = 3
    """Text whose attention scores the vision tokens."""
