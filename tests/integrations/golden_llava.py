# SPDX-License-Identifier: Apache-2.0
"""The model and prompt of golden/end_to_end, as transformers' LLaVA.

The recording marks the image by the id -200 and has no vocabulary entry for it; here it is one more entry at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

GOLDEN = Path(__file__).parent.parent / "golden"


def recording() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The recorded tensors and the description beside them."""
    return load_file(GOLDEN / "end_to_end.safetensors"), json.loads((GOLDEN / "end_to_end.json").read_text())


def model(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    _, about = recording()
    text = {k: v for k, v in about["llm_config"].items() if not k.startswith("mm_")}
    image_token = text["vocab_size"]
    text["vocab_size"] += 1
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=64, **about["clip_config"]),
        text_config=LlamaConfig(**text),
        image_token_index=image_token,
        vision_feature_layer=about["llm_config"]["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
        image_seq_length=about["n_vision_before_merge"],
    )
    llava = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    llava.load_state_dict(_renamed(load_file(GOLDEN / "end_to_end_weights.safetensors"), llava), strict=True)
    llava.generation_config.eos_token_id = None
    return llava


def _renamed(published: dict[str, Tensor], llava: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    inner = "vision_model." if any("vision_tower.vision_model." in name for name in llava.state_dict()) else ""
    prefixes = {
        "model.vision_tower.vision_tower.vision_model.": f"model.vision_tower.{inner}",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "lm_head.": "lm_head.",
        "model.": "model.language_model.",
    }
    state = {}
    for name, weight in published.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        state[prefixes[prefix] + name[len(prefix) :]] = weight
    return state


def inputs() -> dict[str, Tensor]:
    """The prompt with its placeholders spelled out, as a processor would."""
    tensors, about = recording()
    image_token, patches = about["llm_config"]["vocab_size"], about["n_vision_before_merge"]
    ids: list[int] = []
    for token in tensors["input_ids"][0].tolist():
        ids += [image_token] * patches if token == about["image_token_index"] else [token]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": tensors["pixel_values"],
    }
