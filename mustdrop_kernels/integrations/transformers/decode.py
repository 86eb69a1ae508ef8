# SPDX-License-Identifier: Apache-2.0
"""Passes on a shortened cache: one token, or a whole next turn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .attention import causal_mask
from .cache import DropCache
from .compat import CACHE
from .families import Family
from .shortened_cache import LayerTokens, ShortenedCache
from .static_cache import DropStaticCache


class Decode:
    """One forward pass on a shortened cache. Layers that hold the same tokens share mask and rotary table.

    The model itself builds one of each for all layers, from the plain prompt's length. Instead it gets those of most
    layers; the other layers take theirs from the cache's ``layer_inputs``.
    """

    def __init__(
        self,
        family: Family,
        cache: ShortenedCache,
        hidden: Tensor,  # (B, new, any): used for shape, type and device only
        mask: Tensor | None,  # (B, plain length + new), nonzero where there is a token; None: everywhere
    ) -> None:
        self.family = family
        self.cache = cache
        self.hidden = hidden
        self.mask = mask
        self.later = None if mask is None else mask[:, cache.prompt_length :].bool()

    def inputs(self) -> dict[str, Any]:
        """The changed inputs of the model; sets the cache's ``layer_inputs``."""
        tokens = self.cache.layer_tokens
        found = {id(entry): self._inputs_for(entry, tokens.index(entry)) for entry in tokens}
        common = Counter(id(entry) for entry in tokens).most_common(1)[0][0]
        model = dict(found[common])
        mask = model["attention_mask"]
        if isinstance(mask, Tensor) and mask.dim() == 2:  # the model would convert it
            model["attention_mask"], common = None, 0
        self.cache.layer_inputs = {
            i: self._for_layer(found[id(entry)]) for i, entry in enumerate(tokens) if id(entry) != common
        }
        if isinstance(self.cache, DropStaticCache):
            self.cache.declare_layer_inputs()
        return model

    def _for_layer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        own = {"attention_mask": inputs["attention_mask"]}
        if "position_ids" in inputs:
            own["position_embeddings"] = self.family.rotary(self.hidden, inputs["position_ids"])
        return own

    def _inputs_for(self, tokens: LayerTokens, layer: int) -> dict[str, Any]:
        config = self.family.language_model.config
        begin, size = self._filled(tokens, layer)
        inputs = {"attention_mask": causal_mask(config, self.hidden, self._alive(tokens, size), past=begin, size=size)}
        if self.cache.renumbered:
            place = begin - tokens.length + torch.arange(self.hidden.shape[1], device=self.hidden.device)
            inputs["position_ids"] = tokens.counts[:, None].long() + place
        return inputs

    def _filled(self, tokens: LayerTokens, layer: int) -> tuple[Any, int | None]:
        """The next slot to write, and the number of slots of a static cache."""
        if isinstance(self.cache, DropStaticCache):
            return self.cache.layers[layer].cumulative_length, self.cache.size
        return tokens.length + self.cache.generated, None

    def _alive(self, tokens: LayerTokens, size: int | None) -> Tensor | None:  # (B, tokens + generated + new) or more
        if tokens.alive is None and self.later is None:
            return None
        if self.later is not None:
            later = self.later
        else:
            length = self.cache.generated + self.hidden.shape[1] if size is None else size - tokens.length
            later = self.hidden.new_ones(self.hidden.shape[0], length, dtype=torch.bool)
        return torch.cat([tokens.shown(self.mask), later], dim=1)


def replace_inputs(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A pre-hook of a layer in ``layer_inputs``. Simple enough to be compiled with the layer."""
    return args, {**kwargs, **kwargs[CACHE].layer_inputs[layer]}


def check_mask(cache: ShortenedCache, mask: Tensor | None, new: int) -> None:
    """Checks that the caller's mask covers the plain prompt and all tokens after it.

    Raises:
        ValueError: the mask has another shape.
    """
    length = cache.seen + new
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
        shapes = f"(B, {length}), the plain prompt and all that follows, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must be {shapes}")


def needs_nothing(cache: Any, family: Family, mask: Tensor | None) -> bool:
    """Whether one more token attends to everything in its layers, so that the model runs unchanged, without a mask.

    Checking a mask synchronizes with the device once, in place of transformers' own check.
    """
    if not isinstance(cache, ShortenedCache) or not cache.shortened:
        return True
    if not isinstance(cache, DropCache) or cache.renumbered:
        return False
    if any(entry.alive is not None for entry in cache.layer_tokens):
        return False
    name = str(family.language_model.config._attn_implementation)
    if name != "sdpa" and "flash" not in name:  # others need a mask even if nothing is hidden
        return False
    check_mask(cache, mask, 1)
    if mask is not None and cache.state.hidden is not None:
        mask = mask.bool() | nn.functional.pad(cache.state.hidden, (0, mask.shape[1] - cache.prompt_length))
    return mask is None or bool(mask.all())
