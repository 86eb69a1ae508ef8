# SPDX-License-Identifier: Apache-2.0
"""ViP-LLaVA: LLaVA-1.5 with features of several layers of the tower."""

from __future__ import annotations

from .base import Arguments
from .llava import Llava


class VipLlava(Llava):
    """``VipLlavaForConditionalGeneration``; it always cuts CLS off."""

    published = False

    @property
    def feature_layers(self) -> int | list[int]:
        """The layers whose outputs are the features; versions of transformers name them differently."""
        config = self.model.config
        layers: int | list[int] = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
        return layers

    def cut(self, modality: str, arguments: Arguments) -> int:
        """1: the CLS token."""
        return 1
