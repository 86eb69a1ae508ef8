# SPDX-License-Identifier: Apache-2.0
"""The small LLaVA before training: its configuration, tokenizer and processor, and its export to a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from mustdrop_kernels.bench import random_llava
from mustdrop_kernels.bench.random_llava import Sizes, Transformer, hub_name
from mustdrop_kernels.evaluation.pictures import GRID
from mustdrop_kernels.evaluation.questions import WORDS
from mustdrop_kernels.files import folder_written_whole

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_THETA = 1e6
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL))
# No text before the first "USER:" and no newline after the image, as the vocabulary has no use for either.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% if message['content'] is string %}"
    "{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a token per lower-case word."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return random_llava.wrapped(core)


def processor() -> LlavaProcessor:
    """Processor of images and text."""
    return random_llava.processor(GRID, tokenizer(), chat_template=CHAT_TEMPLATE)


def build(seed: int, *, layers: int, width: int, vision_layers: int) -> LlavaForConditionalGeneration:
    """Build the model with random weights."""
    heads = width // 32
    sizes = Sizes(
        tower=Transformer(width, 4 * width, heads, vision_layers),
        language=Transformer(width, width * 11 // 4, heads, layers),
        words=-(-(len(SPECIAL) + len(WORDS)) // 16) * 16,
    )
    config = sizes.config(
        IMAGE, max_position_embeddings=2048, rope_theta=_THETA, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        initializer_range=0.5 * width**-0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config)
    with torch.no_grad():
        language = model.model.language_model
        language.embed_tokens.weight.normal_(0.0, 0.3)
        for layer in language.layers:  # the update of a layer stays small relative to the residual stream
            layer.self_attn.o_proj.weight.mul_((2 * layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * layers) ** -0.5)
        tower(model).embeddings.position_embedding.weight[1:] = _places(width)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = BOS, EOS, PAD
    return model


def tower(model: LlavaForConditionalGeneration) -> torch.nn.Module:
    """The CLIP module that has `embeddings` and `encoder`, under either of transformers' names."""
    found = model.model.vision_tower
    return getattr(found, "vision_model", found)


def _places(width: int) -> torch.Tensor:  # (576, width) float32
    """Initial position embeddings: sines and cosines of rows and columns, which speed up attention to neighbors.

    Their scale is that of the patch embeddings, which would dominate otherwise.
    """
    waves = torch.logspace(math.log2(2.5), math.log2(4 * GRID), width // 4, base=2)  # in patches
    angles = torch.arange(GRID)[:, None] * 2 * math.pi / waves
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (24, width / 2)
    rows, columns = along[:, None].expand(-1, GRID, -1), along[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write float16 weights under the hub's names, with all files that `from_pretrained` requires."""
    with folder_written_whole(folder) as scratch:
        _save(model, scratch)


def _save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    dtype = model.dtype
    model.half().save_pretrained(folder)
    model.to(dtype)
    both = processor()
    both.save_pretrained(folder)
    both.image_processor.save_pretrained(folder)  # path that transformers 4 reads
    _edit(folder / "config.json", lambda config: config["text_config"].update(rope_theta=_THETA))
    _edit(
        folder / "tokenizer_config.json",
        lambda config: config.update(
            tokenizer_class="PreTrainedTokenizerFast", additional_special_tokens=config.pop("extra_special_tokens")
        ),
    )
    weights = folder / "model.safetensors"
    save_file({hub_name(name): x for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit fields that transformers 5 writes under other names than 4 reads."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=2) + "\n")
