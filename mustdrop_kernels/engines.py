# SPDX-License-Identifier: Apache-2.0
"""Former names of ``mustdrop_kernels.plans``."""

from __future__ import annotations

from .plans import PackedPrompts, PaddedPrompts, Prompts, without_leading

__all__ = ["PackedPrompts", "PaddedPrompts", "Prompts", "without_leading"]
