# SPDX-License-Identifier: Apache-2.0
"""Stage 1 behind the tower: whose token each placeholder of an image shares, and which are key tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import ops, stages
from .config import MustDropConfig


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What stage 1 made of an image or a video with N placeholders, which are numbered from 0."""

    modality: str
    views: tuple[Tensor, ...]  # grids of placeholders, (H, W) or (T, H, W) int64, on the host; the finest last
    token: Tensor  # (N) int64, the placeholder whose token stands for this one
    alive: Tensor  # (N) bool, placeholders that hold a token
    key: Tensor  # (N) bool, placeholders that hold a key token

    @property
    def length(self) -> int:
        """N."""
        return self.token.shape[0]


def alone(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token and alive of placeholders that share nothing."""
    return torch.arange(length, device=device), torch.ones(length, dtype=torch.bool, device=device)


def shared(numbers: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Token and alive where placeholders of the same number (N), 1 .. highest, share a token; 0 shares with nobody.

    The first placeholder of a number holds the token.
    """
    length = numbers.shape[0]
    place = torch.arange(length, device=numbers.device)
    number = torch.where(numbers > 0, numbers, highest + 1 + place).long()
    first = place.new_full((highest + 1 + length,), length).scatter_reduce(0, number, place, "amin")
    token = first[number]
    return token, token == place


def merge_features(
    features: Tensor,  # (N, C)
    views: Sequence[Tensor],  # (H, W) or (T, H, W) int64, placeholders
    config: MustDropConfig,
) -> tuple[Tensor, Tensor]:  # (N, C) features, (N) int64 token
    """Merges the windows of alike features of each view; a merged feature stands at its first placeholder."""
    token, _ = alone(features.shape[0], features.device)
    for view in views:
        window = config.window[-view.dim() :] if view.dim() <= len(config.window) else (1, *config.window)
        places = view.flatten().to(features.device)
        merged = ops.spatial_merge(
            features[places][None],
            view.shape,
            window,
            config.merge_threshold,
            budget=config.merge_budget,
            num_prefix_tokens=0,
            backend=config.backend,
        )
        assignment = merged.assignment[0]  # (n) token of each placeholder of the view
        order = torch.arange(len(places), device=places.device)
        first = torch.full_like(order, len(places)).scatter_reduce(0, assignment, order, "amin")
        token = token.index_copy(0, places, places[first[assignment]])
        features = features.index_copy(0, places, merged.tokens[0][assignment].to(features))
    return features, token


def key_tokens(
    importance: Sequence[Tensor],  # per image (N) float32
    shares: Sequence[tuple[Tensor, Tensor]],  # per image (N) token, (N) alive
    views: Sequence[Sequence[Tensor]],  # per image
    config: MustDropConfig,
) -> list[Tensor]:  # per image (N) bool
    """The most important tokens of each image; what is in no view, such as the ends of rows, is none.

    A token that was merged behind the tower is as important as the mean of its members.
    """
    values, candidates = [], []
    for value, (token, alive), grids in zip(importance, shares, views, strict=True):
        if config.merge_at == "features":
            value = torch.zeros_like(value).scatter_reduce(0, token, value, "mean", include_self=False)
        shown = torch.zeros_like(alive)
        shown[torch.cat([grid.flatten() for grid in grids]).to(alive.device)] = True
        values.append(value)
        candidates.append(alive & shown)
    padded, vision = (pad_sequence(column, batch_first=True) for column in (values, candidates))
    keys = stages.select_key_tokens(padded, vision, config)
    return [row[: len(alive)] for row, (_, alive) in zip(keys, shares, strict=True)]
