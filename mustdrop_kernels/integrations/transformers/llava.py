# SPDX-License-Identifier: Apache-2.0
"""Where things are in a LLaVA model, in every supported transformers version. Another model is another such file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaForConditionalGeneration

from ...config import MustDropConfig


class Llava:
    """The parts of a ``LlavaForConditionalGeneration`` that the stages work on."""

    def __init__(self, model: Any, config: MustDropConfig) -> None:
        if not isinstance(model, LlavaForConditionalGeneration):
            raise TypeError(f"drop_tokens serves LlavaForConditionalGeneration, got {type(model).__name__}")
        self.model: Any = model
        self.body: Any = model.model  # takes input_ids and pixel_values
        self.language_model: Any = self.body.language_model
        self.layers: Sequence[Any] = self.language_model.layers
        self.image_token_id: int = model.config.image_token_id
        self.vision_config: Any = self.body.vision_tower.config
        self.vision_layers: Sequence[Any] = ()  # where stage 1 needs them
        self._check_depth(config)
        if config.needs_vision_stage:
            self.vision_layers = self.find_vision_layers()
        if config.merge:
            self._check_merge_layer(config)

    def _check_depth(self, config: MustDropConfig) -> None:
        depth = len(self.layers)
        beyond = [layer for layer in config.pruning_layers if layer >= depth]
        if beyond:
            raise ValueError(
                f"pruning_layers {config.pruning_layers}: the language model has {depth} layers, so there is no layer "
                f"{beyond[0]}; config.for_depth({depth}) leaves such layers out"
            )

    def find_vision_layers(self) -> Sequence[Any]:
        """The tower's layers. Stage 1 needs one CLS token before the patches, and features without it."""
        kind, strategy = self.vision_config.model_type, self.model.config.vision_feature_select_strategy
        if kind != "clip_vision_model" or strategy != "default":
            raise ValueError(
                "merging and key tokens need a CLIP vision tower with vision_feature_select_strategy='default', this "
                f"model has {kind!r} with {strategy!r}; merge=False and key_rate=0.0 leave the tower alone"
            )
        tower = self.body.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers  # transformers 5 took `vision_model` away

    def _check_merge_layer(self, config: MustDropConfig) -> None:
        depth, features = len(self.vision_layers), self.model.config.vision_feature_layer
        taken = [features] if isinstance(features, int) else features
        first = min(layer if layer >= 0 else depth + 1 + layer for layer in taken)  # 0: the embeddings
        if config.merge_layer >= min(first, depth - 1):
            raise ValueError(
                f"merge_layer {config.merge_layer} must come before the tower's last layer ({depth - 1}) and before "
                f"the features are taken (vision_feature_layer={features})"
            )


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: transformers 4 vision layers return a tuple, 5 a tensor."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """A layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
