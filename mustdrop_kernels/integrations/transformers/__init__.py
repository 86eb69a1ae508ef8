# SPDX-License-Identifier: Apache-2.0
"""MustDrop in Hugging Face transformers: ``with drop_tokens(model, config) as report: model.generate(**inputs)``."""

from __future__ import annotations

from .cache import DropCache
from .context import drop_tokens
from .static_cache import DropStaticCache

__all__ = ["DropCache", "DropStaticCache", "drop_tokens"]
