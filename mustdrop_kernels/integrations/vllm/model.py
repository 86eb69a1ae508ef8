# SPDX-License-Identifier: Apache-2.0
"""The models: vLLM's own LLaVA-1.5 and LLaVA-NeXT, dropping."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .dropping import Dropping
from .keys import KeyLayer
from .vision import VisionStage


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MustDropLlavaForConditionalGeneration(Dropping, LlavaForConditionalGeneration):
    """LLaVA-1.5, with stage 1 in its CLIP tower."""

    def _make_vision_stage(self, vllm_config: Any, prefix: str) -> VisionStage:
        """Stage 1 needs a tower with one CLS token before the patches, and features without it."""
        hf_config, config = self.config, self.drop_config
        vision = hf_config.vision_config
        strategy = hf_config.vision_feature_select_strategy
        if vision.model_type != "clip_vision_model" or strategy != "default":
            raise ValueError(
                "mustdrop: merging and key tokens need a CLIP vision tower with "
                f"vision_feature_select_strategy='default', got {vision.model_type!r} with {strategy!r}; merge=False "
                "and key_rate=0.0 leave the tower alone"
            )
        layers = self.vision_tower.vision_model.encoder.layers
        running = list(layers)
        key_layer = None
        if config.key_rate > 0:
            if len(running) != vision.num_hidden_layers - 1:
                raise ValueError(
                    "mustdrop: key_rate needs vision_feature_layer=-2, the input of the tower's last layer, got "
                    f"{hf_config.vision_feature_layer}; key_rate=0.0 leaves the tower alone"
                )
            name = f"{prefix}.vision_tower" if prefix else "vision_tower"
            name = f"{name}.vision_model.encoder.layers.{len(running)}"
            with self._mark_tower_model(vllm_config, "image"):
                key_layer = KeyLayer(vision, vllm_config.quant_config, name, config)
            layers.append(key_layer)
        side = vision.image_size // vision.patch_size
        return VisionStage(running, (side, side), config, key_layer)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of each image at its placeholders."""
        pixels: Any = kwargs.get("pixel_values")  # (images, 3, H, W)
        if self._vision is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        placed = []
        for images in pixels.split(1) if self._vision.one_by_one else [pixels]:
            features = super().embed_multimodal(**{**kwargs, "pixel_values": images})
            placed.append(self._vision.place(features))
        return torch.cat(placed)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MustDropLlavaNextForConditionalGeneration(Dropping, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: stages 2 and 3. All tokens of an image can go, those that end its rows too."""
