# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA with random weights, its tokenizer and processor; nothing is downloaded.

Flat image regions give uniform vision features, so that stage 1 merges windows, and the language model's attention is
uneven, so that stage 2 has clear decisions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop_kernels.bench import random_llava
from mustdrop_kernels.bench.random_llava import PATCH, PROMPT, tokenizer

__all__ = ["PATCH", "PROMPT", "config", "model", "picture", "processor", "tokenizer"]


def processor(grid: int = 12) -> Any:
    """Processor for images of grid x grid patches."""
    return random_llava.processor(grid)


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
    """A float32 model without an end-of-sequence token."""
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
    """A noisy image whose right part is flat at the top and noisier further down, so that some windows merge."""
    size = PATCH * grid
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(float)
    right = pixels[:, size - int(flat * size) :]
    right *= np.linspace(0.0, 0.5, size)[:, None, None]
    right += (40 + 30 * seed) % 60
    return Image.fromarray(pixels.astype(np.uint8))
