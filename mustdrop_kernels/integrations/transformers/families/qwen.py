# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: images and videos of any size, 2 x 2 patches per placeholder, three positions per token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Arguments, Family, Tower


class Qwen2_5VL(Family):
    """``Qwen2_5_VLForConditionalGeneration``."""

    modalities = ("image", "video")
    multi_axis = True

    def tower(self, modality: str) -> Tower:
        """Key tokens are selected by the last layer with full attention between patches."""
        visual = self.body.visual
        last = max(visual.config.fullatt_block_indexes)
        return Tower(
            layers=visual.blocks,
            attention=visual.blocks[last].attn,
            config=visual.config,
            heads=visual.config.num_heads,
            prefix=0,
            whole="attends in windows and joins 2 x 2 patches",
        )

    def _sizes(self, modality: str, arguments: Arguments) -> list[tuple[int, int, int]]:
        """Frames, height and width of each image in placeholders."""
        merge = self.body.visual.spatial_merge_size
        grids = arguments[f"{modality}_grid_thw"].tolist()
        return [(frames, height // merge, width // merge) for frames, height, width in grids]

    def grid(self, modality: str, arguments: Arguments) -> tuple[int, int]:
        """All patches, in the order of the tower."""
        return 1, int(arguments[f"{modality}_grid_thw"].prod(-1).sum())

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """One row of all patches."""
        return 1

    def lead(self, modality: str, arguments: Arguments) -> int:
        """0."""
        return 0

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """The mean over the patches of each placeholder, which the tower orders by windows."""
        grid, visual = arguments[f"{modality}_grid_thw"], self.body.visual
        tokens = maps.reshape(-1, visual.spatial_merge_unit).mean(1)
        tokens = tokens[torch.argsort(self._window_order(grid).to(maps.device))]
        return list(tokens.split((grid.prod(-1) // visual.spatial_merge_unit).tolist()))

    def _window_order(self, grid: Tensor) -> Tensor:
        """The model's own order of windows."""
        visual: Any = self.body.visual
        if hasattr(visual, "get_window_index"):  # until a version of transformers 5
            return torch.as_tensor(visual.get_window_index(grid)[0], device="cpu")
        order, _ = sys.modules[type(visual).__module__].get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return order

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """Height and width of an image; frames before them for a video."""
        views: list[tuple[Tensor, ...]] = []
        for frames, height, width in self._sizes(modality, arguments):
            shape = (height, width) if modality == "image" and frames == 1 else (frames, height, width)
            views.append((torch.arange(frames * height * width, device="cpu").view(shape),))
        return views

    def read_positions(self, positions: Tensor | None, embeds: Tensor, past: int) -> Tensor:
        """Converts (3, B, L), optionally preceded by text positions, or (B, L) to (B, L, 3)."""
        if positions is None or positions.dim() == 2:
            positions = super().read_positions(positions, embeds, past)[None]
        return positions[-3:].expand(3, *embeds.shape[:2]).permute(1, 2, 0).contiguous()

    def position_ids(self, positions: Tensor) -> Tensor:
        """Converts (B, L, 3) to (3, B, L)."""
        return positions.permute(2, 0, 1)
