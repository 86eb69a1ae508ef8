# SPDX-License-Identifier: Apache-2.0
"""Stage 1 in the vision tower: alike windows of each image merge, and CLS names the key tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import stages
from ...config import MustDropConfig

EMPTY, TOKEN, KEY = 0, 1, 2
"""What a placeholder holds, as the features' last channel says: nothing, a token, a key token."""


class VisionStage:
    """A hook in the tower, and the way back to the prompt.

    An image keeps its N placeholders. A merged token stands at the one of its window's first patch; the others are
    empty and leave the prompt before the first layer of the language model. So every token keeps its position. What a
    placeholder holds travels with the features, as one more channel: vLLM caches, slices and batches them.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        grid: tuple[int, int],
        config: MustDropConfig,
        key_layer: Any = None,  # a KeyLayer
    ) -> None:
        if config.merge_layer >= len(layers):
            raise ValueError(
                f"mustdrop: merge_layer {config.merge_layer}: the vision tower runs {len(layers)} layers up to the one "
                "whose features are taken"
            )
        self._grid, self._config, self._key_layer = grid, config, key_layer
        self._source: Tensor | None = None  # (B, N) token that each patch went into, of the run that is on
        if config.merge:
            layers[config.merge_layer].register_forward_hook(self._merge)

    @property
    def one_by_one(self) -> bool:
        """Whether images come out of the tower with lengths of their own, so that each has to run alone."""
        return self._config.merge and self._config.merge_budget is None

    def _merge(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, 1+N, C)
        merged = stages.merge_vision_tokens(output, self._grid, self._config)
        self._source = merged.source[:, 1:] - 1
        # By threshold the tower runs image by image, and waits for the device to learn how long this one is.
        return merged.tokens[:, : int(merged.counts)] if self.one_by_one else merged.tokens

    def place(self, features: Tensor) -> Tensor:
        """Features (B, S, C) of the tokens of each image -> (B, N, C+1) at their placeholders, with the channel."""
        source, self._source = self._source, None
        batch, tokens, channels = features.shape
        if source is None:
            source = torch.arange(tokens, device=features.device).expand(batch, -1)
        patch = torch.arange(source.shape[1], device=source.device).expand_as(source)
        slot = source.new_zeros(batch, tokens).scatter_reduce(1, source, patch, "amin", include_self=False)
        marks = features.new_full((batch, tokens), TOKEN)
        if self._key_layer is not None:
            marks.masked_fill_(self._key_layer.take(), KEY)
        placed = features.new_zeros(batch, source.shape[1], channels + 1)
        marked = torch.cat([features, marks[..., None]], dim=2)
        return placed.scatter_(1, slot[..., None].expand_as(marked), marked)


class Marks(NamedTuple):
    """What the placeholders of a step hold; False at other rows."""

    empty: Tensor  # (rows) bool
    key: Tensor  # (rows) bool

    @classmethod
    def spread(cls, marks: Tensor, placeholders: Tensor) -> Marks:
        """Marks (placeholders in order) -> (rows)."""
        none = torch.zeros_like(placeholders)
        return cls(
            none.masked_scatter(placeholders, marks == EMPTY),
            none.masked_scatter(placeholders, marks == KEY),
        )

    def first(self, rows: int) -> Marks:
        """Without the rows that pad a step."""
        return Marks(self.empty[:rows], self.key[:rows])


def split(embeddings: Sequence[Tensor], channels: int) -> tuple[list[Tensor], Tensor]:
    """Takes the channel off features (N, C+1): features (N, C), and what each placeholder holds (total N)."""
    features = [x[:, :channels] for x in embeddings]
    marks = [x[:, channels] if x.shape[1] > channels else x.new_full((len(x),), TOKEN) for x in embeddings]
    return features, torch.cat(marks)
