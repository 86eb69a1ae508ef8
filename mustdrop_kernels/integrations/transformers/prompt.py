# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt: which positions are text, image or padding, and what stage 1 has left of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import stages
from ...config import MustDropConfig
from ...ops import TokenType
from ...stages import Tokens
from .vision import EncodedImage


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the processor made it."""

    tokens: Tokens  # every placeholder is a vision token
    placeholders: Tensor  # (B, L) bool
    text: list[int]  # text tokens of each sequence
    voters: tuple[int, ...]  # of each sequence
    empty: Tensor  # (B, L) bool, placeholders of patches that went into another's token
    left: tuple[int, ...]  # tokens of each sequence without those


def read_prompt(
    inputs: dict[str, Any],  # of the LLaVA body: input_ids, attention_mask, position_ids, ...
    images: Sequence[EncodedImage],
    image_token_id: int,
    config: MustDropConfig,
) -> Prompt:
    """Waits for the device once, to learn the sequences' lengths.

    Raises:
        ValueError: the inputs do not fit together, or nothing says which tokens matter.
    """
    input_ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if input_ids is None:
        raise ValueError("drop_tokens finds the images by their placeholders: pass input_ids, not inputs_embeds")
    if mask is not None and mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    placeholders = input_ids == image_token_id
    types = stages.token_types(placeholders, mask, config.votes)
    standing = _spread([image.alive for image in images], placeholders)
    protected = _spread([image.key for image in images], placeholders)

    flags = (types != TokenType.PADDING, placeholders, standing, protected, types == TokenType.QUERY)
    counts = torch.stack([flag.sum(1) for flag in flags])
    lengths, slots, vision, keys, voters = (tuple(row) for row in counts.tolist())
    _check(images, slots, voters, config)

    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids).contiguous()
    tokens = Tokens(
        types=types,
        index=place,
        positions=place if positions is None else positions.expand_as(input_ids).contiguous(),
        protected=protected,
        counts=counts[0].int(),
        lengths=lengths,
        vision=slots,
        keys=keys,
    )
    text = [length - slot for length, slot in zip(lengths, slots, strict=True)]
    left = tuple(a + b for a, b in zip(text, vision, strict=True))
    return Prompt(tokens, placeholders, text, voters, placeholders & ~standing, left)


def _spread(flags: Sequence[Tensor], placeholders: Tensor) -> Tensor:
    """Flags (N) of each image's placeholders, in order -> (B, L)."""
    flat = torch.cat(list(flags)).to(placeholders.device)
    rank = placeholders.flatten().cumsum(0).view_as(placeholders) - 1
    return placeholders & flat[rank.clamp(0, flat.numel() - 1)]


def _check(images: Sequence[EncodedImage], slots: Sequence[int], voters: Sequence[int], config: MustDropConfig) -> None:
    patches = sum(image.alive.numel() for image in images)
    if sum(slots) != patches:
        raise ValueError(f"the prompt has {sum(slots)} image placeholders, the images have {patches} patches")
    silent = [row for row, (slot, voter) in enumerate(zip(slots, voters, strict=True)) if slot and not voter]
    if silent and config.pruning_layers:
        raise ValueError(f"no text follows the last image of sequence(s) {silent}: nothing says which tokens matter")
