# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA in a folder, as every engine reads it."""

from __future__ import annotations

from pathlib import Path

import tiny_llava

from mustdrop_kernels.bench import random_llava


def save(folder: Path, *, grid: int = 12, layers: int = 8) -> None:
    """Weights, configuration, tokenizer and processor. Heads of 32, the smallest that vLLM's CPU attention has."""
    model = tiny_llava.model(grid=grid, layers=layers, head_dim=32)
    random_llava.save(folder, model, tiny_llava.processor(grid))
