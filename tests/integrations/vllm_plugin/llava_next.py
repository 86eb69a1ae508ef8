# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-NeXT in a folder, and its masked reference."""

from __future__ import annotations

import math
from pathlib import Path

import checkpoint
import reference_vision
import tiny_llava
import torch
from masked_reference import MaskedReference
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

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
    checkpoint.write(folder, model, processor())


def picture(seed):
    return tiny_llava.picture(seed, GRID).resize(SIZES[seed % len(SIZES)])


class Tiles(reference_vision.Next):
    """Counts the tokens of each tile, and finds its key tokens: in vLLM a tile has its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.tokens, self.keys = [], set()

    def tile(self, pixels, tower, cut=None):
        found = super().tile(pixels, tower, cut)
        importance = {place.owner: place.importance for place in found if place.owner is not None}
        ranked = sorted(importance, key=lambda token: (-importance[token], token))
        self.keys.update(ranked[: math.ceil(self.config.key_rate * len(ranked))])
        self.tokens.append(len(ranked))
        return found


class Reference(MaskedReference):
    """Of one picture, with key tokens tile by tile."""

    def _read(self, inputs):
        super()._read(inputs)
        tiles = Tiles(self.model, self.config, inputs)
        ((placeholders, _),) = tiles.images("image")
        self.tokens = tiles.tokens
        places = inputs["input_ids"] == self.model.config.image_token_id
        self.key[places] = torch.tensor([place.owner in tiles.keys for place in placeholders])
        self.key &= self.present
