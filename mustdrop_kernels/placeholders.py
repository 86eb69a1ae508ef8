# SPDX-License-Identifier: Apache-2.0
"""Placeholders of an image after stage 1: the token that each one shares, and the key tokens."""

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
    """Result of stage 1 for an image or a video with N placeholders, which are numbered from 0."""

    modality: str
    views: tuple[Tensor, ...]  # grids of placeholders, (H, W) or (T, H, W) int64, on the host; the finest last
    token: Tensor  # (N) int64, the placeholder that holds the token of this one
    alive: Tensor  # (N) bool, placeholders that hold a token
    is_key_token: Tensor  # (N) bool, placeholders that hold a key token

    @property
    def length(self) -> int:
        """N."""
        return self.token.shape[0]


Share = tuple[Tensor, Tensor]
"""Token (N) int64 and alive (N) bool of an image, as in ``EncodedImage``."""


def first_placeholders(assignment: Tensor, tokens: int) -> Tensor:  # (..., N) int64 -> (..., tokens) int64
    """First of N placeholders that is assigned to each token, 0 .. tokens - 1; N where a token has none."""
    length = assignment.shape[-1]
    first = assignment.new_full((*assignment.shape[:-1], tokens), length)
    place = torch.arange(length, device=assignment.device).expand_as(assignment)
    return first.scatter_reduce(-1, assignment, place, "amin")


def own_tokens(length: int, device: torch.device) -> Share:
    """Placeholders with a token each."""
    return torch.arange(length, device=device), torch.ones(length, dtype=torch.bool, device=device)


def shared_tokens(numbers: Tensor, highest: int) -> Share:
    """Placeholders (N) that share a token where their numbers, 1 .. highest, are equal; 0 is shared with none.

    The first placeholder of a number holds the token.
    """
    length = numbers.shape[0]
    place = torch.arange(length, device=numbers.device)
    number = torch.where(numbers > 0, numbers, highest + 1 + place).long()
    token = first_placeholders(number, highest + 1 + length)[number]
    return token, token == place


def merge_features(
    features: Tensor,  # (N, C)
    views: Sequence[Tensor],  # (H, W) or (T, H, W) int64, placeholders
    config: MustDropConfig,
) -> tuple[Tensor, Tensor]:  # (N, C) features, (N) int64 token
    """Merges the windows of similar features of each view; the first placeholder of a window holds the token."""
    token, _ = own_tokens(features.shape[0], features.device)
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
        first = first_placeholders(assignment, len(places))
        token = token.index_copy(0, places, places[first[assignment]])
        features = features.index_copy(0, places, merged.tokens[0][assignment].to(features))
    return features, token


def find_key_tokens(
    importance: Sequence[Tensor],  # per image (N) float32
    shares: Sequence[Share],  # per image
    views: Sequence[Sequence[Tensor]],  # per image
    config: MustDropConfig,
) -> list[Tensor]:  # per image (N) bool
    """The most important tokens of each image; placeholders in no view, such as the ends of rows, are excluded.

    The importance of a token that was merged behind the tower is the mean over its members.
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
    selected = stages.select_key_tokens(padded, vision, config)
    return [row[: len(alive)] for row, (_, alive) in zip(selected, shares, strict=True)]
