# SPDX-License-Identifier: Apache-2.0
"""What one ``drop_tokens`` context holds: config, report, stage 1, and the caches that it has shortened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ...config import MustDropConfig
from ...report import Report, Stopwatch
from .calls import Generation, ModelCalls
from .families import Family
from .shortened_cache import ContextLifetime
from .vision import VisionStage

FirstStage = Callable[[Family, MustDropConfig, Stopwatch], VisionStage]
"""Makes stage 1 for a model: ``VisionStage``, or a subclass that keeps other tokens of its images."""


class Session:
    """A context's state; ``calls`` is shared by all contexts of the model."""

    def __init__(
        self, family: Family, config: MustDropConfig, calls: ModelCalls, heat_maps: bool, vision_stage: FirstStage
    ) -> None:
        self.family = family
        self.config = config
        self.calls = calls
        self.heat_maps = heat_maps
        self.report = Report(config)
        self.lifetime = ContextLifetime()
        self.stopwatch = Stopwatch(next(family.model.parameters()).device)
        self.vision = vision_stage(family, config, self.stopwatch)

    @property
    def serves(self) -> bool:
        """Whether calls of this thread belong to this context: it is open, and no generate() of an earlier one runs."""
        generation = self.calls.thread.generation
        return self.lifetime.open and (generation is None or generation.owner is self)

    @contextlib.contextmanager
    def generation(self, prompt_length: int | None) -> Iterator[Generation]:
        """A call of generate() with a prompt of this length."""
        self.stopwatch.read()  # discards what an unfinished prompt has left
        with self.calls.generating(Generation(self, prompt_length)) as generation:
            yield generation
