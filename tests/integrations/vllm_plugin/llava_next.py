# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-NeXT in a folder."""

from __future__ import annotations

from pathlib import Path

import tiny_llava
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from mustdrop_kernels.bench import random_llava

GRID = 6
SIDE = GRID * tiny_llava.PATCH
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = [(2 * SIDE, SIDE), (SIDE, 2 * SIDE - 15), (2 * SIDE - 20, 2 * SIDE)]  # width and height of pictures


def processor() -> LlavaNextProcessor:
    size = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=PINPOINTS)
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tiny_llava.tokenizer(),
        patch_size=tiny_llava.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def save(folder: Path) -> None:
    plain = tiny_llava.config(GRID, head_dim=32)
    config = LlavaNextConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=plain.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration._from_config(config).eval()
    with torch.no_grad():
        model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").mul_(2.0)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(2.0)
    random_llava.save(folder, model, processor())


def picture(seed):
    return tiny_llava.picture(seed, GRID).resize(SIZES[seed % len(SIZES)])
