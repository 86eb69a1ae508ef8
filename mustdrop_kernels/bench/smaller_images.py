# SPDX-License-Identifier: Apache-2.0
"""Smaller images in an engine: about as many vision tokens as a plan has, from fewer pixels and without dropping.

The number is the plan's mean over the layers of the language model, the usual name of a setting in papers, so both
read a prompt with about the same work. In decoding a plan holds fewer tokens: those of its last budget.

A family of models adds its way to ``WAYS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..config import MustDropConfig
from ..errors import Refusal
from ..flops import LanguageModel, schedule


@dataclasses.dataclass(frozen=True)
class Smaller:
    """Engine arguments for smaller images, and the numbers of vision tokens that they make comparable."""

    tokens: int
    """Vision tokens of a smaller image."""
    mean_tokens: float
    """Vision tokens of the plan, mean over the layers."""
    arguments: dict[str, Any]


def of_llava(config: Any, plan: MustDropConfig, random_weights: bool) -> Smaller:
    """A smaller grid of patches. Trained position embeddings fix the grid, so the weights have to be random."""
    if not random_weights:
        raise Refusal("the position embeddings of this model fix the size of its images")
    processed, _ = schedule(LanguageModel.of(config), plan)
    mean = sum(processed) / len(processed)
    patch = config.vision_config.patch_size
    grid = min(range(1, config.vision_config.image_size // patch + 1), key=lambda side: abs(side**2 - mean))
    side = grid * patch
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    arguments = {"hf_overrides": {"vision_config": {"image_size": side}}, "mm_processor_kwargs": size}
    return Smaller(grid**2, mean, arguments)


Way = Callable[[Any, MustDropConfig, bool], Smaller]
WAYS: dict[str, Way] = {"llava": of_llava}
"""By the ``model_type`` of a configuration; each takes it, the plan, and whether the weights are random."""


def smaller_images(config: Any, plan: MustDropConfig, random_weights: bool) -> Smaller:
    """Engine arguments with which this model gets smaller images.

    Raises:
        Refusal: the model has no such arguments, or the plan has thresholds, and so no fixed number of tokens.
    """
    if config.model_type not in WAYS:
        raise Refusal(f"no engine arguments are known that make the images of a {config.model_type!r} model smaller")
    try:
        return WAYS[config.model_type](config, plan, random_weights)
    except ValueError as error:
        raise Refusal(str(error)) from None
