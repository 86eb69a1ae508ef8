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
    reports = []
    for modality, mask in placeholders.items():
        mask = mask.cpu()
        types = {layer: _types(tokens, mask) for layer, tokens in after.items()}
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
                alive={layer: (found[own] != TokenType.PADDING)[token] for layer, found in types.items()},
                kept={layer: int((found[own] == TokenType.VISION).sum()) for layer, found in types.items()},
                hidden=int(image.hidden.sum()),
                tokens=int(image.alive.sum()),
                key_tokens=int(image.is_key_token.sum()),
                heat={layer: values[own][token] for layer, values in maps.items()},
            )
            reports.append((places[begin], report))
            begin += image.length
    return [report for _, report in sorted(reports, key=lambda pair: pair[0])]


def _types(tokens: Tokens, placeholders: Tensor) -> Tensor:
    """(number of placeholders) uint8, in the order of the prompt: the types of remaining tokens, else padding."""
    index, types = tokens.index.cpu(), tokens.types.cpu()
    found = torch.full(placeholders.shape, int(TokenType.PADDING), dtype=torch.uint8, device="cpu")
    sequence, row = (types != TokenType.PADDING).nonzero(as_tuple=True)
    found[sequence, index[sequence, row]] = types[sequence, row]
    return found[placeholders]
