# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA with seeded, untrained weights, its tokenizer and its processor, made here without any download.

It has the geometry of CLIP-L/14-336 (336 pixels, patches of 14, 24x24 of them) and enough language layers for the
published pruning layers, so that every stage has its real shapes. Its weights are random, so its answers are noise.
What the stages see is not noise: a random linear map keeps angles, so flat regions stay alike and edges stay different.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN = "<image>"
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# What the tokenizer is trained on, so that prompts take few tokens and noise reads as words.
_VOCABULARY = """
USER ASSISTANT what is in the image this picture photograph describe a an of on and with at to it there are can you see
where who which how many does do show shows behind above below left right top bottom near far in front small large tall
short bright dark red green blue white black grey orange yellow brown sky ground water light lights night day cloud star
rocket tower fire engine space launch coffee cup table spoon plate cat dog bird face eye hand person people woman man
child flag helmet suit car bus road street house window door tree flower grass mountain river sea boat bridge train
letter word number colour shape line round square long old new open closed standing waiting moving looking made used
"""

# Standard deviation of a weight matrix times the square root of its fan-in, by the end of its name.
_GAINS = {
    "q_proj.weight": 1.5,  # attention that prefers some tokens to others, as a trained model's does
    "k_proj.weight": 1.5,
    "out_proj.weight": 0.3,  # what a layer adds stays small beside what it was given, so that the picture survives
    "o_proj.weight": 0.3,
    "fc2.weight": 0.3,
    "down_proj.weight": 0.3,
    "lm_head.weight": 3.0,
}


def build(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in eval mode on the CPU, and its processor."""
    tokenizer = _tokenizer()
    model = LlavaForConditionalGeneration._from_config(_config(tokenizer)).eval()
    _fill(model, seed)
    words = {tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in _VOCABULARY.split()}
    generation: Any = model.generation_config
    generation.suppress_tokens = [i for i in range(len(tokenizer)) if i not in words]
    generation.eos_token_id = None  # noise has no end
    generation.pad_token_id = tokenizer.pad_token_id
    return model, _processor(tokenizer)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # any text can be written
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in _VOCABULARY.split()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    # transformers 5 has one on PIL alone; in 4 the only one is.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=_CHAT_TEMPLATE,
    )


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """All weights from one generator, so that they do not depend on how a version of transformers initializes."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        elif "position_embedding" in name:
            weight.normal_(0.0, 0.02, generator=generator)
        elif "embed" in name and "patch" not in name:
            weight.normal_(0.0, 1.0, generator=generator)
        else:
            gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
            weight.normal_(0.0, gain / weight[0].numel() ** 0.5, generator=generator)
