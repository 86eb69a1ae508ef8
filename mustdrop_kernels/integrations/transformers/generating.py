# SPDX-License-Identifier: Apache-2.0
"""``generate`` inside drop_tokens: forward hooks are on while it reads a prompt and off while it decodes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .caches import as_drop_cache, cache_for_prompt
from .compat import CACHE, OLD_CACHE
from .decode import Decode, needs_nothing
from .hooks import Hooks
from .patching import patch
from .rollback import rollback_on_error
from .session import has_pictures
from .shortened_cache import ShortenedCache
from .static_cache import DropStaticCache

MASKS = "create_masks_for_generate"
OLD_MASKS = "_prepare_4d_causal_attention_mask_with_cache_position"  # of some models in transformers 4
DYNAMIC = (None, "dynamic", "dynamic_full")


def install(stack: contextlib.ExitStack, hooks: Hooks) -> None:
    """Patches the model's methods for generating; the stack restores them."""
    model = hooks.family.model
    patch(stack, model, "generate", _wrap_generate(hooks, model.generate))
    patch(stack, model, "prepare_inputs_for_generation", _wrap_prepare(hooks, model.prepare_inputs_for_generation))
    patch(stack, model, MASKS, _wrap_masks(getattr(model, MASKS, create_masks_for_generate)))
    if hasattr(model, OLD_MASKS):
        patch(stack, model, OLD_MASKS, _wrap_masks(getattr(model, OLD_MASKS)))


def _wrap_generate(hooks: Hooks, generate: Callable[..., Any]) -> Callable[..., Any]:
    model = hooks.family.model

    @functools.wraps(generate)
    def wrapped(inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        settings = model.generation_config if generation_config is None else generation_config
        setting = lambda name: kwargs.get(name, getattr(settings, name, None))  # noqa: E731
        _check(setting)
        cache = kwargs.pop(CACHE, None)
        cache = kwargs.pop(OLD_CACHE, None) if cache is None else cache
        dynamic = setting("cache_implementation") in DYNAMIC
        if cache is not None or dynamic:
            cache = kwargs[CACHE] = cache_for_prompt(hooks.family.language_model.config, cache)
        given = kwargs.get("input_ids") if inputs is None else inputs
        length = None if given is None else given.shape[1]
        with contextlib.ExitStack() as during:
            during.enter_context(hooks.generation(length, has_pictures(kwargs)))
            during.enter_context(rollback_on_error(cache))
            if dynamic:
                during.enter_context(_without_implementation(model.generation_config))
                during.enter_context(_without_implementation(settings))
            return generate(inputs, generation_config, **kwargs)

    return wrapped


def _wrap_prepare(hooks: Hooks, prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Turns forward hooks on before a prompt and off before a token after it; runs outside of compiled code."""

    @functools.wraps(prepare)
    def wrapped(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(input_ids, *args, **kwargs)
        cache, mask = as_drop_cache(inputs.get(CACHE)), kwargs.get("attention_mask")
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        if tokens.shape[1] > 1 or cache is None or not _begun(cache):
            hooks.enable(mask)
            if isinstance(cache, DropStaticCache) and cache.shortened:
                inputs["attention_mask"] = mask
        elif needs_nothing(cache, hooks.family, mask):
            if isinstance(cache, ShortenedCache) and cache.shortened:
                inputs["attention_mask"] = None
            hooks.disable({})
        elif isinstance(cache, DropStaticCache):
            model = hooks.family.model
            hidden = torch.empty(*tokens.shape[:2], 0, dtype=model.dtype, device=tokens.device)
            inputs |= {CACHE: cache, **Decode(hooks.family, cache, hidden, mask).inputs()}
            hooks.disable(cache.layer_inputs)
        else:
            hooks.enable()
        return inputs

    return wrapped


def _begun(cache: Any) -> bool:
    """Whether a token was written, without synchronizing with the device."""
    return bool(cache.layers) and bool(cache.layers[0].is_initialized) and cache.layers[0].keys is not None


def _wrap_masks(create: Callable[..., Any]) -> Callable[..., Any]:
    """Suppresses generate()'s own masks for a shortened static cache, since they have the plain length."""

    @functools.wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        cache = as_drop_cache(kwargs.get(CACHE, kwargs.get(OLD_CACHE)))
        if isinstance(cache, ShortenedCache) and cache.shortened:
            return None
        return create(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _without_implementation(settings: Any) -> Iterator[None]:
    """Clears ``cache_implementation``; assisted generation in transformers 4 leaves "dynamic_full" there."""
    before = getattr(settings, "cache_implementation", None)
    settings.cache_implementation = None
    try:
        yield
    finally:
        settings.cache_implementation = before


def _check(setting: Callable[[str], Any]) -> None:
    """Raises ``ValueError`` for settings of generate() under which tokens cannot be dropped."""
    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size: drop_tokens reads a prompt in one piece, since the text after the image tokens "
            "scores them"
        )
    if setting("cache_implementation") not in (*DYNAMIC, "static"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r}: drop_tokens cuts caches that are 'dynamic', "
            "which is the default, or 'static'"
        )
    if setting("use_cache") is False:
        raise ValueError("use_cache=False: every step would read the prompt, and drop tokens, anew")
