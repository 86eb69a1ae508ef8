# SPDX-License-Identifier: Apache-2.0
"""Images of a request, by vLLM's multimodal features: text that holds the image token is text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def features(request: Any) -> list[Any]:
    """The image features of a request, of the scheduler or of a model runner."""
    return [feature for feature in request.mm_features or () if feature.modality == "image"]


def end(features: Iterable[Any]) -> int:
    """Number of tokens of a prompt up to the end of its last image."""
    return max((f.mm_position.offset + f.mm_position.length for f in features), default=0)


def rows(features: Iterable[Any], length: int) -> Tensor:
    """(length) bool: the tokens of a prompt that hold image features."""
    found = torch.zeros(length, dtype=torch.bool, device="cpu")
    for position in (feature.mm_position for feature in features):
        place = slice(position.offset, position.offset + position.length)
        found[place] = True if position.is_embed is None else position.is_embed
    return found
