# SPDX-License-Identifier: Apache-2.0
"""``generate`` inside drop_tokens: hooks listen while it reads a prompt, and rest while it decodes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from transformers.cache_utils import StaticCache
from transformers.masking_utils import create_masks_for_generate

from .cache import DropCache
from .compat import CACHE, OLD_CACHE
from .decode import Decode, needs_nothing
from .families import Family
from .patching import patch
from .rollback import undone_on_error
from .shortened_cache import Shortened
from .static_cache import DropStaticCache, books_of

MASKS = "create_masks_for_generate"
OLD_MASKS = "_prepare_4d_causal_attention_mask_with_cache_position"  # of some models in transformers 4
DYNAMIC = (None, "dynamic", "dynamic_full")


class Session(Protocol):
    """What ``generate`` asks of the context that it runs in."""

    family: Family

    def begin(self, prompt_length: int | None, pictures: bool) -> Any:
        """A prompt is about to be read; leaving what this returns, as a context, ends it."""

    def listen(self, mask: Any = None) -> None:
        """Puts the hooks of a forward pass on; `mask` (B, L) is what generate() makes another of for a static cache."""

    def rest(self, own: dict[int, Any]) -> None:
        """Takes them off; layers in `own` go on finding their inputs in the cache."""


def install(stack: contextlib.ExitStack, session: Session) -> None:
    """Patches what of the model belongs to generating; the stack puts it back."""
    model = session.family.model
    patch(stack, model, "generate", _wrap_generate(session, model.generate))
    patch(stack, model, "prepare_inputs_for_generation", _wrap_prepare(session, model.prepare_inputs_for_generation))
    patch(stack, model, MASKS, _wrap_masks(getattr(model, MASKS, create_masks_for_generate)))
    if hasattr(model, OLD_MASKS):
        patch(stack, model, OLD_MASKS, _wrap_masks(getattr(model, OLD_MASKS)))


def _wrap_generate(session: Session, generate: Callable[..., Any]) -> Callable[..., Any]:
    model = session.family.model

    @functools.wraps(generate)
    def wrapped(inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        settings = model.generation_config if generation_config is None else generation_config
        setting = lambda name: kwargs.get(name, getattr(settings, name, None))  # noqa: E731
        _refuse(setting)
        cache = kwargs.pop(CACHE, None)
        cache = kwargs.pop(OLD_CACHE, None) if cache is None else cache
        dynamic = setting("cache_implementation") in DYNAMIC
        if cache is not None or dynamic:
            cache = kwargs[CACHE] = cache_for(session.family, cache)
        given = kwargs.get("input_ids") if inputs is None else inputs
        length = None if given is None else given.shape[1]
        with contextlib.ExitStack() as during:
            during.enter_context(session.begin(length, pictures_in(kwargs)))
            during.enter_context(undone_on_error(cache))
            if dynamic:
                during.enter_context(_without_implementation(model.generation_config))
                during.enter_context(_without_implementation(settings))
            return generate(inputs, generation_config, **kwargs)

    return wrapped


def pictures_in(inputs: dict[str, Any]) -> bool:
    """Whether there is an image or a video among a model's inputs, or what the tower has made of one."""
    named = (name for name, value in inputs.items() if value is not None)
    return any(name.startswith("pixel_values") or name == "mm_encoder_outputs" for name in named)


def cache_for(family: Family, given: Any) -> Any:
    """The cache that a caller has given for a prompt, or a new one.

    Raises:
        TypeError: tokens cannot be dropped from the one that was given.
    """
    if given is None:
        return DropCache(family.language_model.config)
    if isinstance(given, StaticCache) and not isinstance(given, DropStaticCache):
        return DropStaticCache(given)
    if not isinstance(given, Shortened):
        raise TypeError(
            f"{CACHE} is a {type(given).__name__}; inside drop_tokens pass none, a StaticCache, or one that generate "
            "returned inside drop_tokens"
        )
    return given


def _wrap_prepare(session: Session, prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Called before every pass, outside of what is compiled: a prompt is listened to, a token after it is not."""

    @functools.wraps(prepare)
    def wrapped(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(input_ids, *args, **kwargs)
        cache, mask = books_of(inputs.get(CACHE)), kwargs.get("attention_mask")
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        if tokens.shape[1] > 1 or cache is None or not _begun(cache):
            session.listen(mask)
            if isinstance(cache, DropStaticCache) and cache.shortened:
                inputs["attention_mask"] = mask
        elif needs_nothing(cache, session.family, mask):
            if isinstance(cache, Shortened) and cache.shortened:
                inputs["attention_mask"] = None
            session.rest({})
        elif isinstance(cache, DropStaticCache):
            model = session.family.model
            hidden = torch.empty(*tokens.shape[:2], 0, dtype=model.dtype, device=tokens.device)
            inputs |= {CACHE: cache, **Decode(session.family, cache, hidden, mask).inputs()}
            session.rest(cache.own)
        else:
            session.listen()
        return inputs

    return wrapped


def _begun(cache: Any) -> bool:
    """Whether a token was written; without waiting for the device."""
    return bool(cache.layers) and bool(cache.layers[0].is_initialized) and cache.layers[0].keys is not None


def _wrap_masks(create: Callable[..., Any]) -> Callable[..., Any]:
    """For a static cache generate() makes masks before a pass, of the plain length; after drops others are needed."""

    @functools.wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        cache = books_of(kwargs.get(CACHE, kwargs.get(OLD_CACHE)))
        if isinstance(cache, Shortened) and cache.shortened:
            return None
        return create(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _without_implementation(settings: Any) -> Iterator[None]:
    """No name of a cache beside ours; assisted generation in transformers 4 leaves "dynamic_full" behind."""
    before = getattr(settings, "cache_implementation", None)
    settings.cache_implementation = None
    try:
        yield
    finally:
        settings.cache_implementation = before


def _refuse(setting: Callable[[str], Any]) -> None:
    """Says so where a way of generating cannot work, instead of generating something else."""
    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size: drop_tokens reads a prompt in one piece, since the text that says which image tokens "
            "matter comes after them"
        )
    if setting("cache_implementation") not in (*DYNAMIC, "static"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r}: drop_tokens cuts caches that are 'dynamic', "
            "which is the default, or 'static'"
        )
    if setting("use_cache") is False:
        raise ValueError("use_cache=False: every step would read the prompt, and drop tokens, anew")
