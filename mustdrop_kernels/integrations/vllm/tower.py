# SPDX-License-Identifier: Apache-2.0
"""Installation of stage 1 in the CLIP tower of vLLM's LLaVA models."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tp_group

from .key_tokens import KeyTokenLayer
from .vision import VisionStage


def build(model: Any, vllm_config: Any, prefix: str) -> VisionStage:
    """Stage 1 of a model whose tower has one CLS token before the patches and features without it.

    Raises:
        ValueError: the model has another kind of tower or of features.
    """
    hf_config, config = model.config, model.drop_config
    vision, strategy = hf_config.vision_config, hf_config.vision_feature_select_strategy
    if vision.model_type != "clip_vision_model" or strategy != "default":
        raise ValueError(
            "mustdrop: merging and key tokens need a CLIP vision tower with vision_feature_select_strategy='default', "
            f"got {vision.model_type!r} with {strategy!r}; merge=False and key_rate=0.0 leave the tower alone"
        )
    layers = model.vision_tower.vision_model.encoder.layers
    running = list(layers)
    key_layer = _add_key_layer(model, vllm_config, prefix) if config.key_rate > 0 else None
    side, ranks = vision.image_size // vision.patch_size, get_tp_group()
    return VisionStage(running, (side, side), config, key_layer, ranks if ranks.world_size > 1 else None)


def _add_key_layer(model: Any, vllm_config: Any, prefix: str) -> KeyTokenLayer:
    """Adds the tower's last layer, which vLLM does not load where the features are those of the layer before."""
    vision, layers = model.config.vision_config, model.vision_tower.vision_model.encoder.layers
    if len(layers) != vision.num_hidden_layers - 1:
        raise ValueError(
            "mustdrop: key_rate needs vision_feature_layer=-2, the input of the tower's last layer, got "
            f"{model.config.vision_feature_layer}; key_rate=0.0 leaves the tower alone"
        )
    name = f"vision_tower.vision_model.encoder.layers.{len(layers)}"
    name = f"{prefix}.{name}" if prefix else name
    with model._mark_tower_model(vllm_config, "image"):
        key_layer = KeyTokenLayer(vision, vllm_config.quant_config, name, model.drop_config)
    layers.append(key_layer)
    return key_layer
