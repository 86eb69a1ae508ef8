# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA with random weights, its tokenizer and processor; nothing is downloaded.

The vision tower keeps flat regions uniform, so that stage 1 has something to merge, and the language model's
attention is uneven, so that stage 2 has something to choose.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 14
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few words, padding on the left."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([PROMPT + " a red car on the street"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def processor(grid: int = 12) -> LlavaProcessor:
    """Pictures of grid x grid patches."""
    size = PATCH * grid
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def config(
    grid: int = 12, layers: int = 8, vision_layers: int = 4, head_dim: int = 16, key_heads: int = 2
) -> LlavaConfig:
    image_token = tokenizer().convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=PATCH * grid,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.15,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=grid * grid,
    )


def model(
    grid: int = 12,
    layers: int = 8,
    vision_layers: int = 4,
    attention: str = "sdpa",
    seed: int = 0,
    head_dim: int = 16,
    key_heads: int = 2,
) -> LlavaForConditionalGeneration:
    """A model in float32 that never stops by itself."""
    torch.manual_seed(seed)
    settings = config(grid, layers, vision_layers, head_dim, key_heads)
    llava = LlavaForConditionalGeneration._from_config(settings, attn_implementation=attention).eval()
    tower = llava.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.mul_(3.0)
        tower.embeddings.patch_embedding.weight.mul_(2.0)
        for layer in llava.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(2.0)
    llava.generation_config.eos_token_id = None
    llava.generation_config.pad_token_id = 3
    return llava


def picture(seed: int = 0, grid: int = 12, flat: float = 0.5) -> Image.Image:
    """A noisy picture whose right share is flat at the top and less so further down, so that part of it merges."""
    size = PATCH * grid
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(float)
    right = pixels[:, size - int(flat * size) :]
    right *= np.linspace(0.0, 0.5, size)[:, None, None]
    right += (40 + 30 * seed) % 60
    return Image.fromarray(pixels.astype(np.uint8))
