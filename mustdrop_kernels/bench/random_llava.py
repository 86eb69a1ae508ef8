# SPDX-License-Identifier: Apache-2.0
"""LLaVA models with random weights: configuration, model, processor, checkpoint. Nothing is downloaded.

Times and bytes of such a model are real, answers are not; thresholds are meaningless, so schedules have budgets.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

PATCH, GRID = 14, 24  # pixels of a patch, patches of a picture's side
PROMPT = "USER: <image>\nWhat is in the image? ASSISTANT:"


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Sizes of a vision tower or a language model."""

    width: int
    mlp: int
    heads: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaVA."""

    tower: Transformer
    language: Transformer
    words: int

    def config(self, image_token: int | None = None, **text: Any) -> LlavaConfig:
        """The configuration for 336 x 336 pixels in 576 patches; `text` goes to ``LlamaConfig``."""
        text = {"max_position_embeddings": 4096, **text}
        tower, language = self.tower, self.language
        vision_config = CLIPVisionConfig(
            hidden_size=tower.width, intermediate_size=tower.mlp, num_attention_heads=tower.heads,
            num_hidden_layers=tower.layers, image_size=GRID * PATCH, patch_size=PATCH, projection_dim=tower.width,
        )  # fmt: skip
        text_config = LlamaConfig(
            hidden_size=language.width, intermediate_size=language.mlp, num_attention_heads=language.heads,
            num_key_value_heads=language.heads, num_hidden_layers=language.layers, vocab_size=self.words,
            **text,
        )  # fmt: skip
        image_token = self.words - 1 if image_token is None else image_token
        return LlavaConfig(
            vision_config=vision_config, text_config=text_config, image_token_index=image_token,
            image_seq_length=GRID**2, vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip

    def build(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
        """The model; it generates until it is stopped, so every answer has the same length."""
        torch.manual_seed(0)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = LlavaForConditionalGeneration(self.config()).eval()
        finally:
            torch.set_default_dtype(previous)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def weights(self) -> int:
        """Number of weights, without memory for them."""
        return sum(weight.numel() for weight in self.build(device="meta").parameters())


MODELS = {
    "llava-1.5-7b": Sizes(Transformer(1024, 4096, 16, 24), Transformer(4096, 11008, 32, 32), 32064),
    "llava-1.5-13b": Sizes(Transformer(1024, 4096, 16, 24), Transformer(5120, 13824, 40, 40), 32064),
    "llava-1.5-narrow": Sizes(Transformer(256, 1024, 4, 8), Transformer(512, 1376, 8, 32), 2048),
    "llava-1.5-shallow": Sizes(Transformer(128, 320, 4, 4), Transformer(384, 1024, 12, 12), 512),
    "tiny": Sizes(Transformer(64, 128, 2, 4), Transformer(64, 128, 2, 16), 512),
}


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
    return wrapped(core)


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers around one that has LLaVA's special tokens; pads on the left."""
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


def processor(grid: int = GRID, words: PreTrainedTokenizerFast | None = None, **settings: Any) -> Any:
    """The processor for pictures of grid x grid patches; `settings` go to ``LlavaProcessor``."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = PATCH * grid
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=tokenizer() if words is None else words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        **settings,
    )


def save(folder: Path, model: Any, processor: Any) -> None:
    """Write a checkpoint, under the names of weights that checkpoints on the hub have and that every engine reads."""
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({hub_name(name): x for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})


def save_without_weights(folder: Path, sizes: Sizes) -> None:
    """Write a checkpoint without weights, for engines that make random ones, as vLLM with ``load_format="dummy"``."""
    processed = processor()
    config = sizes.config(processed.tokenizer.convert_tokens_to_ids("<image>"))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processed.save_pretrained(folder)


def hub_name(name: str) -> str:
    """Parameter name of the hub's checkpoints, which engines require, for the shorter one of transformers 5."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        return name.replace("language_model.", "language_model.model.", 1)
    return name
