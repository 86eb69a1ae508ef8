# SPDX-License-Identifier: Apache-2.0
"""vLLM's LLaVA-1.5 and LLaVA-NeXT with dropped tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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

from .anyres import shown_patches
from .dropping import DropTokensMixin
from .vision import place_tokens


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MustDropLlavaForConditionalGeneration(DropTokensMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5: an image is one tile."""

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of each image at its placeholders."""
        pixels: Any = kwargs.get("pixel_values")  # (images, 3, H, W)
        if self._vision is None or self._vision.paused or pixels is None:
            return super().embed_multimodal(**kwargs)
        embed = super().embed_multimodal
        tiles = self._vision.encode(lambda images: embed(**{**kwargs, "pixel_values": images}), pixels)
        return [place_tokens([tile], self.drop_config) for tile in tiles]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MustDropLlavaNextForConditionalGeneration(DropTokensMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: each tile of an image merges by itself, and all share its key tokens.

    All other tokens can be pruned later, ends of rows included.
    """

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of each image at its placeholders."""
        pixels: Any = kwargs.get("pixel_values")  # per image (tiles, 3, H, W)
        if self._vision is None or self._vision.paused or pixels is None:
            return super().embed_multimodal(**kwargs)
        sizes: Any = kwargs["image_sizes"]  # (images, 2), height and width
        return [self._embed(image, size) for image, size in zip(pixels, sizes.tolist(), strict=True)]

    def _embed(self, pixels: Tensor, size: list[int]) -> Tensor:  # (tiles, 3, H, W) -> (placeholders, C+1)
        assert self._vision is not None
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        shown = shown_patches(size, len(pixels), vision.image_size, vision.patch_size, pinpoints)
        tiles = self._vision.encode(self._features, pixels)
        return place_tokens(tiles, self.drop_config, shown, self.image_newline)

    def _features(self, pixels: Tensor) -> Tensor:  # (tiles, 3, H, W) -> (tiles, S, C)
        return self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))
