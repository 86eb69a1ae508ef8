# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt: which positions are text, image or padding, and what stage 1 has left of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ... import stages
from ...config import MustDropConfig
from ...ops import TokenType
from ...placeholders import EncodedImage
from ...stages import Tokens


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the processor made it."""

    tokens: Tokens  # every placeholder is a vision token
    placeholders: dict[str, Tensor]  # by modality, (B, L) bool
    images: dict[str, list[EncodedImage]]  # by modality, in the order of the placeholders
    text: list[int]  # text tokens of each sequence
    voters: tuple[int, ...]  # of each sequence
    empty: Tensor  # (B, L) bool, placeholders of patches that went into another's token
    left: tuple[int, ...]  # tokens of each sequence without those


def read_prompt(
    input_ids: Tensor | None,  # (B, L)
    mask: Tensor | None,  # (B, L), nonzero where there is a token
    positions: Tensor,  # (B, L) or (B, L, axes)
    images: Mapping[str, Sequence[EncodedImage]],  # by modality
    token_ids: Mapping[str, int],  # by modality
    config: MustDropConfig,
) -> Prompt:
    """Waits for the device once, to learn the sequences' lengths.

    Raises:
        ValueError: the inputs do not fit together, or nothing says which tokens matter.
    """
    if input_ids is None:
        raise ValueError("drop_tokens finds the images by their placeholders: pass input_ids, not inputs_embeds")
    if mask is not None and mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    places = {modality: input_ids == token_ids[modality] for modality in images}
    present = {modality: list(images[modality]) for modality in images}
    placeholders = torch.stack(list(places.values())).any(0)
    standing = _spread("alive", present, places)
    protected = _spread("is_key_token", present, places)
    types = stages.token_types(placeholders, mask, config.votes)

    flags = (types != TokenType.PADDING, placeholders, standing, protected, types == TokenType.QUERY)
    counts = torch.stack([flag.sum(1) for flag in flags])
    lengths, slots, vision, keys, voters = (tuple(row) for row in counts.tolist())
    silent = [row for row, (slot, voter) in enumerate(zip(slots, voters, strict=True)) if slot and not voter]
    if silent and config.pruning_layers:
        raise ValueError(f"no text follows the last image of sequence(s) {silent}: nothing says which tokens matter")

    tokens = Tokens(
        types=types,
        index=torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids).contiguous(),
        positions=positions,
        protected=protected,
        counts=counts[0].int(),
        lengths=lengths,
        vision_token_counts=slots,
        key_token_counts=keys,
    )
    text = [length - slot for length, slot in zip(lengths, slots, strict=True)]
    left = tuple(a + b for a, b in zip(text, vision, strict=True))
    return Prompt(tokens, places, present, text, voters, placeholders & ~standing, left)


def repeated(images: Sequence[EncodedImage], places: Tensor, features: int) -> list[EncodedImage]:
    """The images in the order of their placeholders (B, L), where generate() has so many features of them.

    It repeats a row for its beams, and all images of a row with it: A B A B for two beams. Waits for the device then.
    """
    times = round(features / max(sum(image.length for image in images), 1))
    if times <= 1:
        return list(images)
    ordered: list[EncodedImage] = []
    rest = list(images)
    for count in places.sum(1).tolist()[::times]:
        own: list[EncodedImage] = []
        while rest and sum(image.length for image in own) < count:
            own.append(rest.pop(0))
        ordered += own * times
    return ordered


def _spread(flag: str, images: Mapping[str, Sequence[EncodedImage]], places: Mapping[str, Tensor]) -> Tensor:
    """A flag (N) of each image's placeholders, in order -> (B, L)."""
    spread = []
    for modality, mask in places.items():
        flat = torch.cat([getattr(image, flag) for image in images[modality]]).to(mask.device)
        rank = mask.flatten().cumsum(0).view_as(mask) - 1
        spread.append(mask & flat[rank.clamp(0, flat.numel() - 1)])
    return torch.stack(spread).any(0)
