# SPDX-License-Identifier: Apache-2.0
"""``generate`` inside drop_tokens: before each pass it is known what the pass needs; most steps need nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import StaticCache
from transformers.masking_utils import create_masks_for_generate

from .caches import as_drop_cache, cache_for_prompt
from .calls import Generation, Step
from .compat import CACHE, OLD_CACHE, STATIC_CACHE_GETTERS
from .decode import Decode, needs_nothing
from .passes import Passes, has_pictures
from .rollback import rollback_on_error
from .shortened_cache import ShortenedCache
from .static_cache import DropStaticCache

MASKS = "create_masks_for_generate"
OLD_MASKS = "_prepare_4d_causal_attention_mask_with_cache_position"  # of some models in transformers 4
SERVED = (None, "dynamic", "dynamic_full", "static")
"""Values of ``cache_implementation``; assisted generation in transformers 4 sets "dynamic_full"."""


class Generating:
    """The model's methods for generating within a context."""

    def __init__(self, passes: Passes) -> None:
        self.passes, self.session, self.calls = passes, passes.session, passes.calls
        self.model = passes.session.family.model
        self.body = vars(passes.session.family.body)

    def install(self) -> None:
        """Replaces the methods."""
        model, replace = self.model, self.passes.methods.set
        replace(model, "generate", self._generate(model.generate))
        replace(model, "prepare_inputs_for_generation", self._prepare(model.prepare_inputs_for_generation))
        replace(model, MASKS, self._masks(getattr(model, MASKS, create_masks_for_generate)))
        if hasattr(model, OLD_MASKS):
            replace(model, OLD_MASKS, self._masks(getattr(model, OLD_MASKS)))
        for name in STATIC_CACHE_GETTERS:
            replace(model, name, self._static_cache(getattr(model, name)))

    def _generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        session = self.session

        @functools.wraps(plain)
        def generate(inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
            settings = self.model.generation_config if generation_config is None else generation_config
            setting = lambda name: kwargs.get(name, getattr(settings, name, None))  # noqa: E731
            pictures = has_pictures(kwargs)
            problem = _problem(setting) if pictures else None
            if problem is not None and session.lifetime.open and not session.config.drops_nothing:
                raise ValueError(problem)
            if problem is not None or not session.lifetime.open:
                with self.calls.generating(Generation(owner=None)):
                    return plain(inputs, generation_config, *args, **kwargs)
            cache = as_drop_cache(kwargs.get(CACHE, kwargs.get(OLD_CACHE)))
            if pictures and cache is not None:
                cache = self._own_cache(cache)
            given = kwargs.get("input_ids") if inputs is None else inputs
            given = kwargs.get("inputs_embeds") if given is None else given
            with session.generation(None if given is None else given.shape[1]) as generation:
                with rollback_on_error(cache):
                    try:
                        output = plain(inputs, generation_config, *args, **kwargs)
                        _check_consumed(generation)
                    finally:
                        self._end(generation)
                return output

        return generate

    def _own_cache(self, given: Any) -> Any:
        """The caller's cache, ready for a prompt with images."""
        try:
            return cache_for_prompt(self.session.family.language_model.config, given)
        except (TypeError, ValueError):
            if not self.session.config.drops_nothing:
                raise
            return given

    def _set_eager(self, on: bool) -> None:
        with self.calls.lock:
            if self.session.lifetime.open:
                self.passes.eager.set(on)

    def _end(self, generation: Generation) -> None:
        with self.calls.lock:
            if generation.rope_deltas is not None:
                self.body["rope_deltas"] = generation.rope_deltas
            if self.session.lifetime.open:
                self.passes.eager.set(False)
                self.passes.layers.set(())
                self.passes.plain_is_prepared = False

    def _prepare(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Decides what the next pass needs; runs outside of compiled code."""

        @functools.wraps(plain)
        def prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            generation = self.calls.thread.generation
            if generation is None or generation.owner is not self.session or not self.session.lifetime.open:
                return plain(input_ids, *args, **kwargs)
            if "rope_deltas" not in self.body:
                inputs = plain(input_ids, *args, **kwargs)
            else:
                with self.calls.lock:
                    if generation.rope_deltas is not None:
                        self.body["rope_deltas"] = generation.rope_deltas
                    inputs = plain(input_ids, *args, **kwargs)
                    generation.rope_deltas = self.body["rope_deltas"]
            if generation.step is not None:
                _check_consumed(generation)
            cache, mask = inputs.get(CACHE), kwargs.get("attention_mask")
            if isinstance(cache, StaticCache):
                cache = as_drop_cache(cache)
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            runs_plain = True
            layers: tuple[int, ...] = ()
            if has_pictures(inputs):
                runs_plain = False
            elif isinstance(cache, ShortenedCache) and cache.shortened:
                if tokens.shape[1] == 1 and needs_nothing(cache, self.session.family, mask):
                    inputs["attention_mask"] = None
                elif tokens.shape[1] == 1 and isinstance(cache, DropStaticCache):
                    hidden = torch.empty(*tokens.shape[:2], 0, dtype=self.model.dtype, device=tokens.device)
                    inputs |= {CACHE: cache, **Decode(self.session.family, cache, hidden, mask).inputs()}
                    layers = tuple(cache.layer_inputs)
                else:
                    runs_plain = False
                    inputs["attention_mask"] = mask
            generation.step = Step(tokens, mask, runs_plain, layers)
            if self.passes.eager.on is runs_plain:
                self._set_eager(not runs_plain)
            self.passes.plain_is_prepared = runs_plain
            return inputs

        return prepare

    def _static_cache(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A cache of its own for a generate() that begins while another one uses the cache on the model."""

        @functools.wraps(plain)
        def get(*args: Any, **kwargs: Any) -> Any:
            with self.calls.lock:
                attributes = vars(self.model)
                kept = attributes.get("_cache")
                used = kept is not None and any(other.static_cache is kept for other in self.calls.generations)
                if used:
                    del attributes["_cache"]
                try:
                    cache = plain(*args, **kwargs)
                finally:
                    if used:
                        attributes["_cache"] = kept
                if self.calls.thread.generation is not None:
                    self.calls.thread.generation.static_cache = cache
                return cache

        return get

    def _masks(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Suppresses generate()'s own masks for a shortened static cache, since they have the plain length."""

        @functools.wraps(plain)
        def create(*args: Any, **kwargs: Any) -> Any:
            cache = as_drop_cache(kwargs.get(CACHE, kwargs.get(OLD_CACHE)))
            if self.session.serves and isinstance(cache, ShortenedCache) and cache.shortened:
                return None
            return plain(*args, **kwargs)

        return create


def _check_consumed(generation: Generation) -> None:
    """Raises ``RuntimeError`` if a pass of generate() has not gone through the context."""
    step, generation.step = generation.step, None
    if step is not None and not step.runs_plain:
        raise RuntimeError(
            "a pass of generate() ran outside of drop_tokens while another thread ran compiled code; with "
            "cache_implementation='static' call the model from one thread, or pass disable_compile=True"
        )


def _problem(setting: Callable[[str], Any]) -> str | None:
    """The reason why generate() with these settings cannot drop tokens, or None."""
    if setting("prefill_chunk_size") is not None:
        return (
            "prefill_chunk_size: drop_tokens reads a prompt in one piece, since the text after the image tokens "
            "scores them; leave it out"
        )
    if setting("cache_implementation") not in SERVED:
        return (
            f"cache_implementation={setting('cache_implementation')!r}: drop_tokens cuts caches that are 'dynamic', "
            "which is the default, or 'static'"
        )
    return None
