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
    importance: Tensor | None = None  # (N) float32, of each placeholder's token; None: there are no key tokens
    hidden: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu"))
    """(N) bool, placeholders that the prompt's attention mask hides, or empty: none."""

    @property
    def length(self) -> int:
        """N."""
        return self.token.shape[0]

    def without(self, hidden: Tensor, config: MustDropConfig) -> EncodedImage:  # (N) bool
        """The image without placeholders that the prompt's attention mask hides.

        A token whose placeholder is hidden moves to the first visible placeholder that shares it; with published
        positions, where a placeholder has no patch of its own, it is gone. Key tokens are selected among what is left.
        """
        place = torch.arange(self.length, device=self.token.device)
        shared = self.token if config.positions == "original" else place
        holder = first_placeholders(shared.masked_fill(hidden, self.length), self.length + 1)[shared]
        alive = ~hidden & (holder == place) & self.alive[shared]
        token = torch.where(hidden | (holder == self.length), place, holder)
        if config.positions == "published":
            token = torch.where(hidden, place, self.token)
        image = dataclasses.replace(self, token=token, alive=alive, hidden=hidden)
        if self.importance is None:
            return dataclasses.replace(image, is_key_token=self.is_key_token & alive)
        (flags,) = select_key_tokens([image], config)
        return dataclasses.replace(image, is_key_token=flags)


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
        budget = None
        if config.merge_budget is not None:
            whole, count = stages.whole_windows(view.shape, window)
            budget = config.merged_windows(count)
            view = view[tuple(slice(side) for side in whole)]
        if not view.numel():
            continue
        places = view.flatten().to(features.device)
        merged = ops.spatial_merge(
            features[places][None],
            view.shape,
            window,
            config.merge_threshold,
            budget=budget,
            num_prefix_tokens=0,
            backend=config.backend,
        )
        assignment = merged.assignment[0]  # (n) token of each placeholder of the view
        first = first_placeholders(assignment, len(places))
        token = token.index_copy(0, places, places[first[assignment]])
        features = features.index_copy(0, places, merged.tokens[0][assignment].to(features))
    return features, token


def token_importance(
    importance: Tensor,  # (N) float32, of each placeholder's patches
    token: Tensor,  # (N) int64
    config: MustDropConfig,
) -> Tensor:  # (N) float32
    """Importance of each placeholder's token: the mean over its members if it was merged behind the tower."""
    if config.merge_at == "features":
        mean = torch.zeros_like(importance).scatter_reduce(0, token, importance, "mean", include_self=False)
        return mean[token]
    return importance


def select_key_tokens(images: Sequence[EncodedImage], config: MustDropConfig) -> list[Tensor]:  # per image (N) bool
    """The most important tokens of each image; placeholders in no view, such as the ends of rows, are excluded."""
    values, candidates = [], []
    for image in images:
        assert image.importance is not None
        shown = torch.zeros_like(image.alive)
        shown[torch.cat([grid.flatten() for grid in image.views]).to(shown.device)] = True
        values.append(image.importance)
        candidates.append(image.alive & shown)
    padded, vision = (pad_sequence(column, batch_first=True) for column in (values, candidates))
    selected = stages.select_key_tokens(padded, vision, config)
    return [row[: image.length] for row, image in zip(selected, images, strict=True)]
