# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and related models: tiles of any resolution with cropped margins and a newline token after each row.

The place of a patch in the prompt is found by passing its number through the model's own packing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Arguments
from .llava import Llava, pixels_of


class LlavaNext(Llava):
    """``LlavaNextForConditionalGeneration``: an overview tile, then the tiles as one picture without margins."""

    published = False

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """By the model's own ``pack_image_features``."""
        tiles = torch.split(maps[..., None], self._tiles(arguments))
        newline = maps.new_full((1,), gap)
        packed, _ = self.body.pack_image_features(
            tiles, arguments["image_sizes"], image_newline=newline, **self._packing(arguments)
        )
        return [numbers[:, 0] for numbers in packed]

    def _packing(self, arguments: Arguments) -> dict[str, Any]:
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return {"vision_feature_select_strategy": strategy}

    def _tiles(self, arguments: Arguments) -> list[int]:
        """Number of tiles of each image, the overview included, by the model's own function."""
        config, count = self.model.config, sys.modules[type(self.body).__module__].image_size_to_num_patches
        size = config.vision_config.image_size
        return [
            count(image_size=image, grid_pinpoints=config.image_grid_pinpoints, patch_size=size)
            for image in arguments["image_sizes"]
        ]

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """Number of tiles of all pictures."""
        return sum(self._tiles(arguments))

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """The overview, and the picture without newlines. Placeholders are found by packing numbers on the host."""
        height, width = self.grid(modality, arguments)
        lead = self.lead(modality, arguments)
        marks = torch.zeros(self.tiles(modality, arguments), lead + height * width, device="cpu")
        views: list[tuple[Tensor, ...]] = []
        for packed in self.pack(modality, marks, arguments, gap=1.0):
            overview = lead + torch.arange(height * width, device="cpu").view(height, width)
            fine = torch.arange(overview.numel() + lead, len(packed), device="cpu")
            ends = packed[fine].nonzero()
            if len(fine) > 1:
                fine = fine.view(-1, int(ends[0]) + 1)[:, :-1]
                views.append((overview, fine))
            else:  # a picture of one tile, with one newline at the end
                views.append((overview,))
        return views


class LlavaNextVideo(LlavaNext):
    """``LlavaNextVideoForConditionalGeneration``: also videos, whose frames are pooled after the tower."""

    modalities = ("image", "video")

    def why_whole(self, modality: str, arguments: Arguments) -> str | None:
        """Videos cannot merge in the tower, since pooling requires all patches of a frame."""
        return _POOLED if modality == "video" else super().why_whole(modality, arguments)

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """The mean over the pooled patches, frame by frame."""
        if modality != "video":
            return super().pack(modality, maps, arguments, gap)
        height, width = self.grid(modality, arguments)
        pooled = self._pool(maps[:, maps.shape[1] - height * width :].view(-1, height, width))
        return list(pooled.reshape(pixels_of(arguments).shape[0], -1))

    def _pool(self, maps: Tensor) -> Tensor:  # (frames, H, W) -> (frames, H / stride, W / stride)
        return nn.functional.avg_pool2d(maps[:, None], self.model.config.spatial_pool_stride)[:, 0]

    def tiles(self, modality: str, arguments: Arguments) -> int:
        """Number of tiles of pictures, or of frames of videos."""
        return Llava.tiles(self, modality, arguments) if modality == "video" else super().tiles(modality, arguments)

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """Frames, height and width after pooling."""
        if modality != "video":
            return super().views(modality, lengths, arguments)
        frames = pixels_of(arguments).shape[1]
        height, width = self._pooled(*self.grid(modality, arguments))
        return [(torch.arange(frames * height * width, device="cpu").view(frames, height, width),) for _ in lengths]

    def _pooled(self, height: int, width: int) -> tuple[int, int]:
        stride = self.model.config.spatial_pool_stride
        return height // stride, width // stride


_POOLED = "hands the frames of a video to a pooling that needs all patches"


class LlavaOnevision(LlavaNextVideo):
    """``LlavaOnevisionForConditionalGeneration``: SigLIP, pictures that may be shrunk after it, pooled videos."""

    def _packing(self, arguments: Arguments) -> dict[str, Any]:
        ratio = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return {"vision_aspect_ratio": ratio}

    def _tiles(self, arguments: Arguments) -> list[int]:
        """One tile for each of several images in a prompt."""
        tiles = super()._tiles(arguments)
        counts = arguments.get("batch_num_images")
        if counts is None:
            return tiles
        alone = [count == 1 for count in counts.tolist() for _ in range(count)]
        return [many if single else 1 for many, single in zip(tiles, alone, strict=True)]

    def why_whole(self, modality: str, arguments: Arguments) -> str | None:
        """Pictures that are shrunk after the tower cannot merge in it, since that requires all patches."""
        if modality == "image" and "image_sizes" in arguments:
            height, width = self.grid(modality, arguments)
            marks = torch.ones(self.tiles(modality, arguments), height * width, device="cpu")
            marks[:, ::2] = 0.0
            packed = torch.cat(self.pack(modality, marks, arguments, gap=0.0))
            if not ((packed == 0) | (packed == 1)).all():
                return "hands pictures of this size to an interpolation that needs all patches"
        return super().why_whole(modality, arguments)

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """Adds the newline token at the end of a video."""
        packed = super().pack(modality, maps, arguments, gap)
        if modality != "video":
            return packed
        return [torch.cat([numbers, numbers.new_full((1,), gap)]) for numbers in packed]

    def _pool(self, maps: Tensor) -> Tensor:  # (frames, H, W) -> (frames, ceil(H / 2), ceil(W / 2))
        return nn.functional.interpolate(maps[:, None], size=self._pooled(*maps.shape[1:]), mode="bilinear")[:, 0]

    def _pooled(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 2), -(-width // 2)
