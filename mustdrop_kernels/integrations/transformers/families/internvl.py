# SPDX-License-Identifier: Apache-2.0
"""InternVL: tiles whose patches are joined 2 x 2 after the tower. Each tile is an image here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Arguments, Family, Tower, bare


class InternVL(Family):
    """``InternVLForConditionalGeneration``; frames of a video are tiles, too."""

    def tower(self, modality: str) -> Tower:
        """A tower without merging: its layers take no mask, and joining requires all patches."""
        tower = self.body.vision_tower
        layers = tower.encoder.layer
        return Tower(
            layers=layers,
            attention=layers[-1].attention,
            config=tower.config,
            heads=tower.config.num_attention_heads,
            prefix=1,
            whole="joins 2 x 2 patches behind its layers",
        )

    def grid(self, modality: str, arguments: Arguments) -> tuple[int, int]:
        """Height and width of a tile in patches."""
        pixels, patch = arguments["pixel_values"], bare(self.model.config.vision_config, "patch_size")
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """Number of tiles of all images."""
        return int(arguments["pixel_values"].shape[0])

    def lead(self, modality: str, arguments: Arguments) -> int:
        """0: the CLS token is cut off."""
        return 0

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """The mean over the joined patches."""
        height, width = self.grid(modality, arguments)
        joined = torch.nn.functional.avg_pool2d(maps.view(-1, 1, height, width), self._joined)
        return list(joined.flatten(1))

    @property
    def _joined(self) -> int:
        """Patches of a placeholder along one side."""
        return round(1 / self.model.config.downsample_ratio)

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """The placeholders of a tile."""
        height, width = (side // self._joined for side in self.grid(modality, arguments))
        return [(torch.arange(height * width, device="cpu").view(height, width),) for _ in lengths]
