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

    tokens: Tokens  # every placeholder that the mask shows is a vision token
    vision: Tensor  # (B, L) bool, all placeholders
    placeholders: dict[str, Tensor]  # by modality, (B, L) bool
    images: dict[str, list[EncodedImage]]  # by modality, in the order of the placeholders
    text: list[int]  # text tokens of each sequence
    text_queries: tuple[int, ...]  # number of text queries of each sequence
    empty: Tensor  # (B, L) bool, placeholders of patches that were merged into another's token
    remaining: tuple[int, ...]  # tokens of each sequence without the empty placeholders


def find_placeholders(input_ids: Tensor | None, token_ids: Mapping[str, int]) -> dict[str, Tensor]:
    """(B, L) bool by modality, from ids (B, L) and the placeholder's id of each modality.

    Raises:
        ValueError: there are neither `input_ids` nor embeddings that show the placeholders.
    """
    if input_ids is None:
        raise ValueError("drop_tokens finds the images by their placeholders: pass input_ids or inputs_embeds")
    return {modality: input_ids == token_id for modality, token_id in token_ids.items()}


def read_prompt(
    places: Mapping[str, Tensor],  # by modality, (B, L) bool
    mask: Tensor | None,  # (B, L), nonzero where there is a token
    positions: Tensor,  # (B, L) or (B, L, axes)
    images: Mapping[str, Sequence[EncodedImage]],  # by modality
    config: MustDropConfig,
) -> Prompt:
    """Token types and counts of a prompt. Placeholders that the mask hides are padding.

    Synchronizes with the device once, to read the counts, and once more for each image if the mask hides placeholders.
    """
    present = {modality: list(images[modality]) for modality in images}
    placeholders = torch.stack(list(places.values())).any(0)
    types = stages.token_types(placeholders, mask, config.text_queries)
    real = types != TokenType.PADDING
    if mask is not None and bool((placeholders & ~real).any()):
        present = {modality: _shown(present[modality], places[modality], real, config) for modality in images}
    alive = _spread("alive", present, places)
    text_query, vision = types == TokenType.QUERY, types == TokenType.VISION
    # Where no text follows the images there are no text queries to score the vision tokens: they all remain.
    protected = (_spread("is_key_token", present, places) | ~text_query.any(1, keepdim=True)) & vision
    empty = placeholders & real & ~alive & ~stages.last_tokens(real)  # the last token's logits are the output

    flags = (real, vision, protected, text_query, placeholders & real, empty)
    counts = torch.stack([flag.sum(1) for flag in flags])
    lengths, vision_counts, key_counts, text_queries, shown, merged = (tuple(row) for row in counts.tolist())
    tokens = Tokens(
        types=types,
        index=torch.arange(types.shape[1], device=types.device).expand_as(types).contiguous(),
        positions=positions,
        protected=protected,
        counts=counts[0].int(),
        lengths=lengths,
        vision_token_counts=vision_counts,
        key_token_counts=key_counts,
    )
    text = [length - count for length, count in zip(lengths, shown, strict=True)]
    remaining = tuple(length - count for length, count in zip(lengths, merged, strict=True))
    return Prompt(tokens, placeholders, dict(places), present, text, text_queries, empty, remaining)


def _shown(images: Sequence[EncodedImage], places: Tensor, real: Tensor, config: MustDropConfig) -> list[EncodedImage]:
    """The images of a modality without the placeholders (B, L) that are not real."""
    flat, begin, shown = real[places], 0, []
    for image in images:
        shown.append(image.without(~flat[begin : begin + image.length], config))
        begin += image.length
    return shown


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
