# SPDX-License-Identifier: Apache-2.0
"""Token types as kernel constants."""

from __future__ import annotations

import triton.language as tl

from ...ops.token_types import TokenType

PADDING = tl.constexpr(int(TokenType.PADDING))
VISION = tl.constexpr(int(TokenType.VISION))
QUERY = tl.constexpr(int(TokenType.QUERY))
