# SPDX-License-Identifier: Apache-2.0
"""Differences between the supported versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LlavaModel

OLD_CACHE = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else OLD_CACHE
"""Models' keyword for the cache; newer versions of transformers 5 renamed it and still accept the old one."""


STATIC_CACHE_GETTERS = tuple(
    name
    for name in ("_get_cache", "_prepare_static_cache")
    if hasattr(GenerationMixin, name) and "_cache" in getattr(GenerationMixin, name).__code__.co_names
)
"""Methods that keep the static cache of generate() on the model, as ``_cache``; none in newer versions."""


def hidden_of(output: Any) -> Any:
    """A layer's hidden states: transformers 4 vision layers return a tuple, 5 a tensor."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """A layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def features_of(output: Any) -> list[Tensor]:
    """The features that a ``get_..._features`` has returned, in pieces (n, C) of any length."""
    features = getattr(output, "pooler_output", output)  # transformers 4 returns the features themselves
    if isinstance(features, tuple) and not isinstance(features[-1], Tensor):  # next to the number of frames
        features = features[0]
    return [piece.flatten(0, -2) for piece in features]


def with_features(output: Any, flat: Tensor) -> Any:  # flat: (sum of n, C)
    """The same output with other features of the same shapes."""
    if hasattr(output, "pooler_output"):
        output.pooler_output = with_features(output.pooler_output, flat)
        return output
    if isinstance(output, Tensor):
        return flat.view_as(output)
    if isinstance(output, tuple) and not isinstance(output[-1], Tensor):
        return (flat.view_as(output[0]), *output[1:])
    pieces = flat.split([piece.shape[:-1].numel() for piece in output])
    return type(output)(piece.view_as(old) for piece, old in zip(pieces, output, strict=True))
