# SPDX-License-Identifier: Apache-2.0
"""Where things are in a LLaVA model, in every supported transformers version. Another model is another such file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

from ...config import MustDropConfig


class Llava:
    """The parts of a ``LlavaForConditionalGeneration`` that the stages work on."""

    def __init__(self, model: nn.Module, config: MustDropConfig) -> None:
        if not isinstance(model, LlavaForConditionalGeneration):
            raise TypeError(f"drop_tokens serves LlavaForConditionalGeneration, got {type(model).__name__}")
        self.model = model
        self.body = model.model  # takes input_ids and pixel_values
        self.language_model = self.body.language_model
        self.layers: Sequence[nn.Module] = self.language_model.layers
        self.image_token_id: int = model.config.image_token_id
        self.vision_layers: Sequence[nn.Module] = ()
        self.patch_size: int = getattr(self.body.vision_tower.config, "patch_size", 0)
        beyond = [layer for layer in config.pruning_layers if layer >= len(self.layers)]
        if beyond:
            raise ValueError(
                f"pruning_layers {config.pruning_layers}: the language model has {len(self.layers)} layers, "
                f"so there is no layer {beyond[0]}; config.for_depth({len(self.layers)}) leaves those out"
            )
        if config.needs_vision_stage:
            self._find_vision_layers(config)

    def _find_vision_layers(self, config: MustDropConfig) -> None:
        """Stage 1 needs a tower with one CLS token before the patches, and features without it."""
        tower = self.body.vision_tower
        strategy = self.model.config.vision_feature_select_strategy
        if tower.config.model_type != "clip_vision_model" or strategy != "default":
            raise ValueError(
                "merging and key tokens need a CLIP vision tower with vision_feature_select_strategy='default', "
                f"this model has {tower.config.model_type!r} with {strategy!r}; "
                "merge=False and key_rate=0.0 leave the tower alone"
            )
        # transformers 5 took the inner `vision_model` away.
        self.vision_layers = getattr(tower, "vision_model", tower).encoder.layers
        if config.merge:
            depth = len(self.vision_layers)
            features = self.model.config.vision_feature_layer
            taken = [features] if isinstance(features, int) else features
            first = min(layer if layer >= 0 else depth + 1 + layer for layer in taken)  # 0: the embeddings
            if config.merge_layer >= min(first, depth - 1):
                raise ValueError(
                    f"merge_layer {config.merge_layer} must come before the tower's last layer ({depth - 1}) and "
                    f"before the layers whose output is the feature (vision_feature_layer={features})"
                )


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: transformers 4 vision layers return a tuple, 5 a tensor."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """A layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
