# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA: one tower for images, one for frames of videos, with CLS tokens among their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Arguments, Tower
from .llava import Llava


class VideoLlava(Llava):
    """``VideoLlavaForConditionalGeneration``: a frame is a tile, a video all placeholders of its frames."""

    modalities = ("image", "video")
    published = False

    def tower(self, modality: str) -> Tower | None:
        """The tower of images or of videos."""
        return self._tower(self.body.video_tower if modality == "video" else self.body.image_tower, modality)

    def cut(self, modality: str, arguments: Arguments) -> int:
        """0 for frames, which keep their CLS token."""
        return 0 if modality == "video" else super().cut(modality, arguments)

    def pack(self, modality: str, maps: Tensor, arguments: Arguments, gap: float) -> list[Tensor]:
        """The frames of a video in one sequence."""
        if modality != "video":
            return super().pack(modality, maps, arguments, gap)
        videos = arguments["pixel_values_videos"].shape[0]
        return list(maps.reshape(videos, -1))

    def views(self, modality: str, lengths: Sequence[int], arguments: Arguments) -> list[tuple[Tensor, ...]]:
        """Frames, height and width, without the CLS tokens."""
        if modality != "video":
            return super().views(modality, lengths, arguments)
        frames = arguments["pixel_values_videos"].shape[1]
        height, width = self.grid(modality, arguments)
        lead = self.lead(modality, arguments)
        places = torch.arange(frames * (lead + height * width), device="cpu").view(frames, -1)[:, lead:]
        return [(places.reshape(frames, height, width),) for _ in lengths]
