# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-NeXT in a folder, and its masked reference."""

from __future__ import annotations

from pathlib import Path

import checkpoint
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


class Reference(MaskedReference):
    """Stage 1 tile by tile; transformers says which patch stands where."""

    def _prompt(self, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        placeholder = ids == self.model.config.image_token_id
        embeds = self.model.get_input_embeddings()(ids).clone()
        present, key = mask.clone(), torch.zeros_like(mask)
        (tiles,) = inputs["pixel_values"]
        encoded = [self._encode(tile) for tile in tiles]
        self.tokens = [len(first) for _, first, _ in encoded]
        taken = set()
        shown = self._shown(len(tiles), inputs["image_sizes"])
        for place, number in zip(placeholder[0].nonzero()[:, 0].tolist(), shown, strict=True):
            if number < 0:
                embeds[0, place] = self.model.model.image_newline
                continue
            tile, patch = divmod(number, GRID * GRID)
            features, first, keys = encoded[tile]
            token = first.index(patch if patch in first else self._window_begin(patch))
            present[0, place] = (tile, token) not in taken
            taken.add((tile, token))
            embeds[0, place], key[0, place] = features[token], token in keys
        voters = mask & (torch.arange(ids.shape[1]) > placeholder.nonzero()[:, 1].max())
        return embeds, present, voters, placeholder & present, key & present

    def _shown(self, tiles, image_sizes):
        """Which patch of which tile each placeholder shows, -1 at the ends of rows."""
        numbers = torch.arange(tiles * GRID * GRID, dtype=torch.float32).view(tiles, -1, 1)
        features, _ = self.model.model.pack_image_features([numbers], image_sizes, "default", torch.tensor([-1.0]))
        return features[0][:, 0].int().tolist()

    def _window_begin(self, patch):
        height, width = self.config.window
        row, column = divmod(patch, GRID)
        return row // height * height * GRID + column // width * width
