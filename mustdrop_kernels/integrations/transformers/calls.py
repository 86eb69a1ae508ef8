# SPDX-License-Identifier: Apache-2.0
"""Calls of a model from any number of threads: one lock for its forward passes, and the ``generate`` of each thread."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...placeholders import EncodedImage


@dataclasses.dataclass(eq=False)
class Step:
    """A forward pass that generate() has prepared."""

    tokens: Tensor  # (B, L) ids, or (B, L, C) embeddings, that the pass gets
    mask: Any
    """attention_mask of the plain sequence, before generate() converts it for a static cache."""
    runs_plain: bool
    """The pass needs nothing but the inputs of ``layers``."""
    layers: tuple[int, ...] = ()
    """Layers that take inputs of their own from the cache."""


@dataclasses.dataclass(eq=False)
class Generation:
    """A call of generate() in one thread."""

    owner: object
    """The session of the context in which it was called; None: the model's own code runs."""
    prompt_length: int | None = None
    step: Step | None = None
    encoded: dict[str, list[EncodedImage]] = dataclasses.field(default_factory=dict)
    """By modality: images that generate() encodes before its first pass."""
    reported: bool = False
    """Its prompt is in the report."""
    static_cache: Any = None
    """The cache of ``cache_implementation="static"``."""
    rope_deltas: Any = None
    """Difference between position and index, which Qwen2.5-VL keeps on the model between steps."""


class ThreadState(threading.local):
    """What runs in one thread."""

    generation: Generation | None = None
    """The generate() that runs."""
    plain: bool = False
    """A pass of the model's own code runs."""


class ModelCalls:
    """The calls of one model, in this context and in those before and after it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held during a forward pass, and while a context begins and ends."""
        self.thread = ThreadState()
        self.generations: list[Generation] = []
        """Those of all threads, nested ones too."""

    @contextlib.contextmanager
    def generating(self, generation: Generation) -> Iterator[Generation]:
        """Sets this thread's generate(); calls may be nested."""
        thread = self.thread
        outer, thread.generation = thread.generation, generation
        self.generations.append(generation)
        try:
            yield generation
        finally:
            thread.generation = outer
            self.generations.remove(generation)


_calls: weakref.WeakKeyDictionary[nn.Module, ModelCalls] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(model: nn.Module) -> ModelCalls:
    """The calls of a model, the same for all of its contexts."""
    with _lock:
        return _calls.setdefault(model, ModelCalls())
