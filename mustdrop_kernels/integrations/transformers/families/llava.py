# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: an image is one tile, and each patch has one placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....config import MustDropConfig
from .base import Arguments, Family, Tower

PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens before the patches, by the kind of tower."""


def pixels_of(arguments: Arguments) -> Tensor:
    """(images, 3, height, width), or (videos, frames, 3, height, width), by the argument's name in this model."""
    names = ("pixel_values", "pixel_values_images", "pixel_values_videos")
    return next(arguments[name] for name in names if name in arguments)


class Llava(Family):
    """``LlavaForConditionalGeneration``, and the base of all models whose tower is CLIP or SigLIP."""

    published = True

    def tower(self, modality: str) -> Tower | None:
        """The tower, if it is CLIP or SigLIP."""
        return self._tower(self.body.vision_tower, modality)

    def _tower(self, module: Any, modality: str) -> Tower | None:
        prefix = PREFIX.get(module.config.model_type)
        if prefix is None or self.cut(modality, {}) > prefix:
            return None
        layers = getattr(module, "vision_model", module).encoder.layers  # transformers 5 removed `vision_model`
        return Tower(layers, layers[-1].self_attn, module.config, module.config.num_attention_heads, prefix)

    def cut(self, modality: str, arguments: Arguments) -> int:
        """Number of tokens that the model cuts off before the features."""
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return int(strategy == "default")

    def why_whole(self, modality: str, arguments: Arguments) -> str | None:
        """The reason why the patches of these images cannot merge inside the tower, or None."""
        if self.tower(modality) is None:
            strategy = getattr(self.model.config, "vision_feature_select_strategy", None)
            return (
                f"is {self.vision_kind!r} with vision_feature_select_strategy={strategy!r}, neither CLIP nor SigLIP "
                "with 'full'"
            )
        return None

    def lead(self, modality: str, arguments: Arguments) -> int:
        """1 for a CLS token that is not cut off, else 0."""
        tower = self.tower(modality)
        return 0 if tower is None else tower.prefix - self.cut(modality, arguments)

    def grid(self, modality: str, arguments: Arguments) -> tuple[int, int]:
        """Height and width of a tile in patches."""
        pixels, patch = pixels_of(arguments), self.model.config.vision_config.patch_size
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """Number of images, or of frames of videos."""
        return pixels_of(arguments).shape[:-3].numel()

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """Every tile is an image."""
        return list(maps)

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """The patches of the tile."""
        height, width = self.grid(modality, arguments)
        lead = self.lead(modality, arguments)
        return [(lead + torch.arange(height * width, device="cpu").view(height, width),) for _ in lengths]

    @property
    def feature_layers(self) -> int | list[int]:
        """The layers whose outputs are the features; 0: the embeddings."""
        layers: int | list[int] = self.model.config.vision_feature_layer
        return layers

    def check(self, config: MustDropConfig) -> None:
        """Also checks that merging comes before the features are taken."""
        super().check(config)
        if config.merges_in_tower:
            for tower in filter(None, map(self.tower, self.modalities)):
                self._check_merge_layer(tower, config)

    def _check_merge_layer(self, tower: Tower, config: MustDropConfig) -> None:
        depth, features = len(tower.layers), self.feature_layers
        taken = [features] if isinstance(features, int) else features
        first = min(layer if layer >= 0 else depth + 1 + layer for layer in taken)  # 0: the embeddings
        if config.merge_layer >= min(first, depth - 1):
            raise ValueError(
                f"merge_layer {config.merge_layer} must come before the tower's last layer ({depth - 1}) and before "
                f"the features are taken (vision_feature_layer={features})"
            )
