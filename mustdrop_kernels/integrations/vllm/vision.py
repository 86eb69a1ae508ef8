# SPDX-License-Identifier: Apache-2.0
"""Stage 1 in the vision tower: similar windows of each tile merge, CLS attention selects each image's key tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import stages
from ...config import MustDropConfig
from ...placeholders import first_placeholders

EMPTY, TOKEN, KEY_TOKEN = 0, 1, 2
"""Content of a placeholder, in the last channel of the features."""


class EncodedTile(NamedTuple):
    """The tower's S tokens of N patches."""

    assignment: Tensor  # (N) int64, token of each patch
    features: Tensor  # (S, C)
    importance: Tensor | None = None  # (S) float32, CLS attention; None without key tokens


class VisionStage:
    """A hook in the tower that merges patches, and the tokens of each tile after it.

    An image keeps its placeholders. The first one that shows a patch of a merged window holds the token; the others are
    empty and are dropped before the first layer of the language model, so that every token keeps its position. The
    content of a placeholder is one more channel of its features, since vLLM caches, slices and batches features.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],  # the layers that run up to the features
        grid: tuple[int, int],
        config: MustDropConfig,
        key_layer: Any = None,  # a KeyTokenLayer
        ranks: Any = None,  # vLLM's group of ranks that share the tower's heads; None: this rank has all
    ) -> None:
        if config.merge_layer >= len(layers):
            raise ValueError(
                f"mustdrop: merge_layer {config.merge_layer}: the vision tower runs {len(layers)} layers up to the one "
                "whose features are taken"
            )
        self._grid, self._config, self._key_layer, self._ranks = grid, config, key_layer, ranks
        self._assignment: Tensor | None = None  # (B, N) token of each patch, of the current run
        self.paused = False
        """Whether the tower runs as without this stage."""
        if config.merge:
            layers[config.merge_layer].register_forward_hook(self._merge)

    def encode(self, run: Callable[[Tensor], Tensor], pixels: Tensor) -> list[EncodedTile]:
        """Runs tower and projector, (B, 3, H, W) -> (B, S, C), over B tiles.

        With a merge threshold the tiles differ in length, so each runs alone.
        """
        alone = self._config.merge and self._config.merge_budget is None
        return [tile for tiles in (pixels.split(1) if alone else [pixels]) for tile in self._tiles(run(tiles))]

    def _merge(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, 1+N, C)
        if self.paused:
            return output
        if self._ranks is not None:  # sums may differ between ranks, which must merge the same windows
            output = self._ranks.broadcast(output.contiguous())
        merged = stages.merge_vision_tokens(output, self._grid, self._config)
        self._assignment = merged.assignment[:, 1:] - 1
        # With a threshold this synchronizes with the device, to read the length of the tile.
        return merged.tokens if self._config.merge_budget is not None else merged.tokens[:, : int(merged.counts)]

    def _tiles(self, features: Tensor) -> list[EncodedTile]:  # (B, S, C)
        assignment, self._assignment = self._assignment, None
        batch, tokens, _ = features.shape
        if assignment is None:
            assignment = torch.arange(tokens, device=features.device).expand(batch, -1)
        importance = [None] * batch if self._key_layer is None else self._key_layer.pop_importance()
        return [EncodedTile(*tile) for tile in zip(assignment, features, importance, strict=True)]


def place_tokens(
    tiles: Sequence[EncodedTile],  # of one image, N patches each
    config: MustDropConfig,
    shown: Tensor | None = None,  # (P) int64, patch of all tiles that a placeholder shows; -1: the end of a row
    end: Tensor | None = None,  # (C) feature of the end of a row
) -> Tensor:  # (P, C+1), features and content
    """The tokens of an image at its placeholders. By default each patch has one, in order.

    Tokens whose patches were all cropped away are left out. The number of key tokens is that of the image, so tiles
    that CLS attends to more have more of them. An empty placeholder repeats the feature of its window: if it ends the
    prompt, its row is the output and remains.
    """
    features = torch.cat([tile.features for tile in tiles])
    begins = itertools.accumulate((len(tile.features) for tile in tiles), initial=0)
    token = torch.cat([tile.assignment + begin for tile, begin in zip(tiles, begins, strict=False)])
    if shown is not None:
        shown = shown.to(token.device)
        token = torch.where(shown < 0, len(features), token[shown])  # one more token for the ends of rows
    places = len(token)
    slot = first_placeholders(token, len(features) + 1)[:-1]

    def at_placeholders(x: Tensor) -> Tensor:  # (tokens, ...) -> (P, ...)
        return x.new_zeros(places + 1, *x.shape[1:]).index_copy(0, slot, x)[:-1]

    placed = torch.nn.functional.pad(features, (0, 0, 0, 1))[token]
    alive = at_placeholders(torch.ones_like(slot, dtype=torch.bool))
    contents = torch.where(alive, TOKEN, EMPTY)
    if config.key_rate > 0:
        importance = at_placeholders(torch.cat([tile.importance for tile in tiles if tile.importance is not None]))
        is_key_token = stages.select_key_tokens(importance[None], alive[None], config)[0]
        contents = contents.masked_fill(is_key_token, KEY_TOKEN)
    if shown is not None and end is not None:
        placed = torch.where((shown < 0)[:, None], end.to(placed), placed)
        contents = contents.masked_fill(shown < 0, TOKEN)
    return torch.cat([placed, contents[:, None].to(placed)], dim=1)


class PlaceholderFlags(NamedTuple):
    """Contents of the placeholders of a step; False at other rows."""

    empty: Tensor  # (rows) bool
    is_key_token: Tensor  # (rows) bool

    @classmethod
    def of(cls, contents: Tensor, placeholders: Tensor) -> PlaceholderFlags:  # (placeholders), (rows) bool
        """Flags of all rows from the contents of the placeholders, in order."""
        none = torch.zeros_like(placeholders)
        return cls(
            none.masked_scatter(placeholders, contents == EMPTY),
            none.masked_scatter(placeholders, contents == KEY_TOKEN),
        )

    def first(self, rows: int) -> PlaceholderFlags:
        """The flags without the rows that pad a step."""
        return PlaceholderFlags(self.empty[:rows], self.is_key_token[:rows])


def split_contents(embeddings: Sequence[Tensor], channels: int) -> tuple[list[Tensor], Tensor]:
    """Splits features (N, C+1) into features (N, C) and the contents of all placeholders (total N)."""
    features = [x[:, :channels] for x in embeddings]
    contents = [x[:, channels] if x.shape[1] > channels else x.new_full((len(x),), TOKEN) for x in embeddings]
    return features, torch.cat(contents)
