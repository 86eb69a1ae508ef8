# SPDX-License-Identifier: Apache-2.0
"""Former names of ``mustdrop_kernels.plans``."""

from __future__ import annotations

from .plans import DropPlan as Prompts
from .plans import PackedDropPlan as PackedPrompts
from .plans import PaddedDropPlan as PaddedPrompts
from .plans import skip_leading_blocks as without_leading

__all__ = ["PackedPrompts", "PaddedPrompts", "Prompts", "without_leading"]
