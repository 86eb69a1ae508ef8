# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA in a folder, under the names that checkpoints on the hub have and that every engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_llava
from safetensors.torch import load_file, save_file


def save(folder: Path, *, grid: int = 12, layers: int = 8) -> None:
    """Weights, configuration, tokenizer and processor. Heads of 32, the smallest that vLLM's CPU attention has."""
    model = tiny_llava.model(grid=grid, layers=layers, head_dim=32)
    write(folder, model, tiny_llava.processor(grid))


def write(folder: Path, model: Any, processor: Any) -> None:
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({hub_name(name): x for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})


def hub_name(name: str) -> str:
    """transformers 5 writes shorter names than the hub's checkpoints have."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        return name.replace("language_model.", "language_model.model.", 1)
    return name
