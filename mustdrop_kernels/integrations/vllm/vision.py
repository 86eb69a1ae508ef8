# SPDX-License-Identifier: Apache-2.0
"""Stage 1 in the vision tower: alike windows of each tile merge, and CLS names the key tokens of each image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import stages
from ...config import MustDropConfig

EMPTY, TOKEN, KEY = 0, 1, 2
"""What a placeholder holds, as the features' last channel says: nothing, a token, a key token."""


class Tile(NamedTuple):
    """What the tower has made of N patches: S tokens."""

    assignment: Tensor  # (N) int64, token that each patch went into
    features: Tensor  # (S, C)
    importance: Tensor | None = None  # (S) float32, what CLS looks at; None: nobody asks for key tokens


class VisionStage:
    """A hook in the tower, and the way back to the prompt.

    An image keeps its placeholders. A merged token stands at the first one that shows a patch of its window; the others
    are empty and leave the prompt before the first layer of the language model. So every token keeps its position. What
    a placeholder holds travels with the features, as one more channel: vLLM caches, slices and batches them.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],  # those that run up to the features
        grid: tuple[int, int],
        config: MustDropConfig,
        key_layer: Any = None,  # a KeyLayer
        ranks: Any = None,  # vLLM's group of those that share the tower's heads; None: this one has all
    ) -> None:
        if config.merge_layer >= len(layers):
            raise ValueError(
                f"mustdrop: merge_layer {config.merge_layer}: the vision tower runs {len(layers)} layers up to the one "
                "whose features are taken"
            )
        self._grid, self._config, self._key_layer, self._ranks = grid, config, key_layer, ranks
        self._assignment: Tensor | None = None  # (B, N) token that each patch went into, of the run that is on
        if config.merge:
            layers[config.merge_layer].register_forward_hook(self._merge)

    def encode(self, run: Callable[[Tensor], Tensor], pixels: Tensor) -> list[Tile]:
        """Runs tower and projector, (B, 3, H, W) -> (B, S, C), over B tiles.

        By threshold tiles come out with lengths of their own, so that each has to run alone.
        """
        alone = self._config.merge and self._config.merge_budget is None
        return [tile for tiles in (pixels.split(1) if alone else [pixels]) for tile in self._tiles(run(tiles))]

    def _merge(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, 1+N, C)
        if self._ranks is not None:  # ranks may have added in different orders, and all have to merge the same windows
            output = self._ranks.broadcast(output.contiguous())
        merged = stages.merge_vision_tokens(output, self._grid, self._config)
        self._assignment = merged.assignment[:, 1:] - 1
        # By threshold: a wait for the device, to learn how long this tile is.
        return merged.tokens if self._config.merge_budget is not None else merged.tokens[:, : int(merged.counts)]

    def _tiles(self, features: Tensor) -> list[Tile]:  # (B, S, C)
        assignment, self._assignment = self._assignment, None
        batch, tokens, _ = features.shape
        if assignment is None:
            assignment = torch.arange(tokens, device=features.device).expand(batch, -1)
        importance = [None] * batch if self._key_layer is None else self._key_layer.take()
        return [Tile(*tile) for tile in zip(assignment, features, importance, strict=True)]


def place(
    tiles: Sequence[Tile],  # of one image, N patches each
    config: MustDropConfig,
    shown: Tensor | None = None,  # (P) int64, patch of all tiles' that a placeholder shows; -1: none, the end of a row
    end: Tensor | None = None,  # (C) feature of the end of a row
) -> Tensor:  # (P, C+1), features and what a placeholder holds
    """The tokens of an image at its placeholders. By default each patch has one, in order.

    A token none of whose patches is shown, since its window was cropped away, is left out. Key tokens are the image's,
    so its tiles have as many as CLS finds in them: a tile of sky fewer than one with the text.
    """
    features = torch.cat([tile.features for tile in tiles])
    begins = itertools.accumulate((len(tile.features) for tile in tiles), initial=0)
    token = torch.cat([tile.assignment + begin for tile, begin in zip(tiles, begins, strict=False)])
    if shown is not None:
        shown = shown.to(token.device)
        token = torch.where(shown < 0, len(features), token[shown])  # the ends of rows are one token more
    places = len(token)
    order = torch.arange(places, device=token.device)
    slot = order.new_full((len(features) + 1,), places).scatter_reduce(0, token, order, "amin")[:-1]

    def at_placeholders(x: Tensor) -> Tensor:  # (tokens, ...) -> (P, ...)
        return x.new_zeros(places + 1, *x.shape[1:]).index_copy(0, slot, x)[:-1]

    placed, held = at_placeholders(features), at_placeholders(torch.ones_like(slot, dtype=torch.bool))
    marks = torch.where(held, TOKEN, EMPTY)
    if config.key_rate > 0:
        importance = at_placeholders(torch.cat([tile.importance for tile in tiles if tile.importance is not None]))
        marks = marks.masked_fill(stages.select_key_tokens(importance[None], held[None], config)[0], KEY)
    if shown is not None and end is not None:
        placed = torch.where((shown < 0)[:, None], end.to(placed), placed)
        marks = marks.masked_fill(shown < 0, TOKEN)
    return torch.cat([placed, marks[:, None].to(placed)], dim=1)


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
