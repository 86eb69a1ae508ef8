# SPDX-License-Identifier: Apache-2.0
"""Token types of a prompt, and the result of stage 1 at its placeholders."""

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
    """A batch of prompts, before anything is dropped."""

    tokens: Tokens  # every placeholder is a vision token
    placeholders: dict[str, Tensor]  # by modality, (B, L) bool
    images: dict[str, list[EncodedImage]]  # by modality, in the order of the placeholders
    text: list[int]  # text tokens of each sequence
    text_queries: tuple[int, ...]  # number of text queries of each sequence
    empty: Tensor  # (B, L) bool, placeholders of patches that were merged into another's token
    remaining: tuple[int, ...]  # tokens of each sequence without the empty placeholders


def read_prompt(
    input_ids: Tensor | None,  # (B, L)
    mask: Tensor | None,  # (B, L), nonzero where there is a token
    positions: Tensor,  # (B, L) or (B, L, axes)
    images: Mapping[str, Sequence[EncodedImage]],  # by modality
    token_ids: Mapping[str, int],  # by modality
    config: MustDropConfig,
) -> Prompt:
    """Token types and counts of a prompt. Synchronizes with the device once, to read the counts.

    Raises:
        ValueError: `input_ids` are missing, the mask has another shape, or a sequence with images has no text query.
    """
    if input_ids is None:
        raise ValueError("drop_tokens finds the images by their placeholders: pass input_ids, not inputs_embeds")
    if mask is not None and mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    places = {modality: input_ids == token_ids[modality] for modality in images}
    present = {modality: list(images[modality]) for modality in images}
    placeholders = torch.stack(list(places.values())).any(0)
    alive = _spread("alive", present, places)
    protected = _spread("is_key_token", present, places)
    types = stages.token_types(placeholders, mask, config.text_queries)

    flags = (types != TokenType.PADDING, placeholders, alive, protected, types == TokenType.QUERY)
    counts = torch.stack([flag.sum(1) for flag in flags])
    lengths, slots, vision, key_counts, text_queries = (tuple(row) for row in counts.tolist())
    pairs = zip(slots, text_queries, strict=True)
    silent = [row for row, (slot, queries) in enumerate(pairs) if slot and not queries]
    if silent and config.pruning_layers:
        raise ValueError(f"no text follows the last image of sequence(s) {silent}: there are no text queries")

    tokens = Tokens(
        types=types,
        index=torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids).contiguous(),
        positions=positions,
        protected=protected,
        counts=counts[0].int(),
        lengths=lengths,
        vision_token_counts=slots,
        key_token_counts=key_counts,
    )
    text = [length - slot for length, slot in zip(lengths, slots, strict=True)]
    remaining = tuple(a + b for a, b in zip(text, vision, strict=True))
    return Prompt(tokens, places, present, text, text_queries, placeholders & ~alive, remaining)


def repeated(images: Sequence[EncodedImage], places: Tensor, features: int) -> list[EncodedImage]:
    """The images in the order of their placeholders (B, L), repeated to the given number of features.

    generate() repeats a row for its beams, and all images of a row with it: A B A B for two beams. Synchronizes with
    the device if images are repeated.
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
    """The flags (N) of each image's placeholders, as (B, L)."""
    spread = []
    for modality, mask in places.items():
        flat = torch.cat([getattr(image, flag) for image in images[modality]]).to(mask.device)
        rank = mask.flatten().cumsum(0).view_as(mask) - 1
        spread.append(mask & flat[rank.clamp(0, flat.numel() - 1)])
    return torch.stack(spread).any(0)
