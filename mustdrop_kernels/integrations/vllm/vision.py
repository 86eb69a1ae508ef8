# SPDX-License-Identifier: Apache-2.0
"""Stage 1 in the vision tower: the most alike windows of each image merge, a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import stages
from ...config import MustDropConfig


class VisionMerge:
    """A hook in the tower, and the way back to the prompt.

    An image keeps its N placeholders. A merged token stands at the one of its window's first patch; the others are
    empty and leave the prompt before the first layer of the language model. So every token keeps its position. Which
    placeholders are empty travels with the features, as one more channel: vLLM caches, slices and batches them.
    """

    def __init__(self, layers: Sequence[nn.Module], grid: tuple[int, int], config: MustDropConfig) -> None:
        if config.merge_layer >= len(layers):
            raise ValueError(
                f"mustdrop: merge_layer {config.merge_layer}: the vision tower runs {len(layers)} layers up to the one "
                "whose features are taken"
            )
        self._grid, self._config = grid, config
        self._source: Tensor | None = None  # (B, N) token that each patch went into, of the run that is on
        layers[config.merge_layer].register_forward_hook(self._merge)

    def _merge(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, 1+N, C)
        merged = stages.merge_vision_tokens(output, self._grid, self._config)
        self._source = merged.source[:, 1:] - 1
        return merged.tokens

    def place(self, features: Tensor) -> Tensor:
        """Features (B, S, C) of the tokens of each image -> (B, N, C+1) at their placeholders, with the channel."""
        source, self._source = self._source, None
        assert source is not None
        batch, tokens, channels = features.shape
        patch = torch.arange(source.shape[1], device=source.device).expand_as(source)
        slot = source.new_zeros(batch, tokens).scatter_reduce(1, source, patch, "amin", include_self=False)
        placed = features.new_zeros(batch, source.shape[1], channels + 1)
        marked = torch.cat([features, features.new_ones(batch, tokens, 1)], dim=2)
        return placed.scatter_(1, slot[..., None].expand_as(marked), marked)


def split(embeddings: Sequence[Tensor], channels: int) -> tuple[list[Tensor], Tensor]:
    """Takes the channel off features (N, C+1): features (N, C), and whether each placeholder holds a token."""
    features = [x[:, :channels] for x in embeddings]
    holds = [x[:, channels] != 0 if x.shape[1] > channels else x.new_ones(len(x), dtype=torch.bool) for x in embeddings]
    return features, torch.cat(holds)
