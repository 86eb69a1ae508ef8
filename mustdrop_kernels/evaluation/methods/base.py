# SPDX-License-Identifier: Apache-2.0
"""Method: a configuration of the three stages, with an optional other first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...config import MustDropConfig

NOTHING = MustDropConfig(merge=False, key_rate=0.0, pruning_layers=())
"""Drops nothing."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that a schedule depends on."""

    depth: int
    """Layers of the language model."""
    patches: int = 576

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """From a transformers config of a LLaVA."""
        tower = config.vision_config
        return cls(config.text_config.num_hidden_layers, (tower.image_size // tower.patch_size) ** 2)


@dataclass(frozen=True)
class Method:
    """A method as ``drop_tokens`` takes it."""

    config: MustDropConfig
    stage: Callable[[int], Callable[..., Any]] | None = None
    """Makes another first stage from a seed; see ``drop_tokens(vision_stage=)``."""

    in_tower: bool = False
    """True where that stage changes the results of the vision tower."""

    @property
    def leaves_tower(self) -> bool:
        """True if the vision tower computes the same as in the plain model."""
        return not self.in_tower and not self.config.needs_vision_stage
