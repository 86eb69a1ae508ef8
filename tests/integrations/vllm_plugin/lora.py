# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters of a checkpoint, and the checkpoint with one of them merged into its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
LANGUAGE = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def _deltas(checkpoint: Path, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each linear layer of the language model."""
    random = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=random) * 0.1

    return {
        name: (matrix(RANK, weight.shape[1]), matrix(weight.shape[0], RANK))
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if name.startswith("language_model.model.layers") and name.split(".")[-2] in LANGUAGE
    }


def save(folder: Path, checkpoint: Path, seed: int) -> None:
    tensors = {}
    for name, (a, b) in _deltas(checkpoint, seed).items():
        base = "base_model.model." + name.removesuffix(".weight")
        tensors |= {base + ".lora_A.weight": a, base + ".lora_B.weight": b}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": LANGUAGE, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def save_merged(folder: Path, checkpoint: Path, seed: int) -> None:
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, (a, b) in _deltas(checkpoint, seed).items():
        tensors[name] = tensors[name] + ALPHA / RANK * b @ a
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
