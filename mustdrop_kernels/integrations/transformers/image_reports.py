# SPDX-License-Identifier: Apache-2.0
"""Reports of the images of a prompt: placeholders of the prompt mapped back to the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ops import TokenType
from ...placeholders import EncodedImage
from ...report import ImageReport
from ...stages import Tokens


def image_reports(
    images: Mapping[str, Sequence[EncodedImage]],  # by modality
    placeholders: Mapping[str, Tensor],  # by modality, (B, L) bool
    after: Mapping[int, Tokens],  # pruning layer -> remaining tokens
    heat: Mapping[int, Tensor],  # layer -> (B, L) float32
) -> list[ImageReport]:
    """One report per image or video, in the order of the prompt. Synchronizes with the device."""
    found = []
    for modality, mask in placeholders.items():
        mask = mask.cpu()
        alive = {layer: _alive(tokens, mask) for layer, tokens in after.items()}
        maps = {layer: values.cpu()[mask] for layer, values in heat.items()}
        places = torch.nonzero(mask).tolist()  # (row, column) of each placeholder
        begin = 0
        for image in images[modality]:
            own = slice(begin, begin + image.length)
            token = image.token.cpu()
            report = ImageReport(
                sequence=places[begin][0],
                modality=modality,
                views=image.views,
                token=token,
                keys=image.is_key_token.cpu()[token],
                alive={layer: flags[own][token] for layer, flags in alive.items()},
                kept={layer: int(flags[own].sum()) for layer, flags in alive.items()},
                tokens=int(image.alive.sum()),
                key_tokens=int(image.is_key_token.sum()),
                heat={layer: values[own][token] for layer, values in maps.items()},
            )
            found.append((places[begin], report))
            begin += image.length
    return [report for _, report in sorted(found, key=lambda pair: pair[0])]


def _alive(tokens: Tokens, placeholders: Tensor) -> Tensor:
    """(number of placeholders) bool, in the order of the prompt: placeholders whose token remains."""
    index, vision = tokens.index.cpu(), (tokens.types == TokenType.VISION).cpu()
    flags = torch.zeros_like(placeholders)
    rows = torch.arange(len(flags))[:, None].expand_as(index)
    flags[rows[vision], index[vision]] = True
    return flags[placeholders]
