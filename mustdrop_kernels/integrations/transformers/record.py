# SPDX-License-Identifier: Apache-2.0
"""From places in the prompt back to places in the pictures, for the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ops import TokenType
from ...report import ImageReport
from ...stages import Tokens
from .vision import EncodedImage


def image_reports(
    images: Sequence[EncodedImage],
    placeholders: Tensor,  # (B, L) bool
    after: Mapping[int, Tokens],  # pruning layer -> what went on
) -> list[ImageReport]:
    """One report per image, in the order of the prompt. Waits for the device."""
    placeholders = placeholders.cpu()
    alive = {layer: _alive(tokens, placeholders) for layer, tokens in after.items()}
    rows = torch.nonzero(placeholders)[:, 0].tolist()
    reports = []
    begins = itertools.accumulate((len(image.alive) for image in images), initial=0)
    for image, begin in zip(images, begins, strict=False):  # the last begin is the end
        own = slice(begin, begin + len(image.alive))
        token_of_patch = image.token_of_patch.cpu()
        reports.append(
            ImageReport(
                sequence=rows[begin],
                token_of_patch=token_of_patch.view(image.grid),
                key=image.key.cpu()[token_of_patch].view(image.grid),
                survived={layer: flags[own][token_of_patch].view(image.grid) for layer, flags in alive.items()},
                kept={layer: int(flags[own].sum()) for layer, flags in alive.items()},
                tokens=image.tokens,
                key_tokens=image.key_tokens,
            )
        )
    return reports


def _alive(tokens: Tokens, placeholders: Tensor) -> Tensor:
    """(number of placeholders) bool, in the order of the prompt: those whose token is still there."""
    index, vision = tokens.index.cpu(), (tokens.types == TokenType.VISION).cpu()
    flags = torch.zeros_like(placeholders)
    rows = torch.arange(len(flags))[:, None].expand_as(index)
    flags[rows[vision], index[vision]] = True
    return flags[placeholders]
