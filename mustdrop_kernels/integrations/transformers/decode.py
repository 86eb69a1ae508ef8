# SPDX-License-Identifier: Apache-2.0
"""Going on after a prompt whose tokens were dropped: by one token, or by a whole next turn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .attention import causal_mask
from .cache import DropCache
from .compat import CACHE
from .families import Family
from .shortened_cache import Held, Shortened
from .static_cache import DropStaticCache


class Decode:
    """One forward pass on a shortened cache. Layers that hold the same tokens share mask and rotary table.

    The model builds one of each for all layers, from the plain prompt's length. It is given those that most layers
    need; the others find theirs in the cache's ``own``.
    """

    def __init__(
        self,
        family: Family,
        cache: Shortened,
        hidden: Tensor,  # (B, new, any): only its shape, type and device matter
        mask: Tensor | None,  # (B, plain length + new), nonzero where there is a token; None: everywhere
    ) -> None:
        self.family = family
        self.cache = cache
        self.hidden = hidden
        self.behind = None if mask is None else mask[:, cache.prompt_length :].bool()

    def inputs(self) -> dict[str, Any]:
        """What changes in the model's inputs; sets the cache's ``own``."""
        held = self.cache.held
        found = {id(entry): self._inputs_for(entry, held.index(entry)) for entry in held}
        often = Counter(id(entry) for entry in held).most_common(1)[0][0]
        model = dict(found[often])
        mask = model["attention_mask"]
        if isinstance(mask, Tensor) and mask.dim() == 2:  # the model would make another of it
            model["attention_mask"], often = None, 0
        self.cache.own = {i: self._for_layer(found[id(entry)]) for i, entry in enumerate(held) if id(entry) != often}
        if isinstance(self.cache, DropStaticCache):
            self.cache.declare_own()
        return model

    def _for_layer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        own = {"attention_mask": inputs["attention_mask"]}
        if "position_ids" in inputs:
            own["position_embeddings"] = self.family.rotary(self.hidden, inputs["position_ids"])
        return own

    def _inputs_for(self, held: Held, layer: int) -> dict[str, Any]:
        config = self.family.language_model.config
        begin, size = self._filled(held, layer)
        inputs = {"attention_mask": causal_mask(config, self.hidden, self._alive(held, size), past=begin, size=size)}
        if self.cache.renumbered:
            place = begin - held.length + torch.arange(self.hidden.shape[1], device=self.hidden.device)
            inputs["position_ids"] = held.counts[:, None].long() + place
        return inputs

    def _filled(self, held: Held, layer: int) -> tuple[Any, int | None]:
        """The slot that is written next, and how many a static cache has."""
        if isinstance(self.cache, DropStaticCache):
            return self.cache.layers[layer].cumulative_length, self.cache.size
        return held.length + self.cache.generated, None

    def _alive(self, held: Held, size: int | None) -> Tensor | None:  # (B, held.length + generated + new), or more
        if held.alive is None and self.behind is None:
            return None
        if self.behind is not None:
            behind = self.behind
        else:
            length = self.cache.generated + self.hidden.shape[1] if size is None else size - held.length
            behind = self.hidden.new_ones(self.hidden.shape[0], length, dtype=torch.bool)
        return torch.cat([held.real(), behind], dim=1)


def own_inputs(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook in front of a layer that has inputs of its own. Simple enough to be compiled with the layer."""
    return args, {**kwargs, **kwargs[CACHE].own[layer]}


def check_mask(cache: Shortened, mask: Tensor | None, new: int) -> None:
    """The caller's mask counts behind the prompt, and the cache knows the prompt's; so it must cover both.

    Raises:
        ValueError: it does not.
    """
    length = cache.seen + new
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
        shapes = f"(B, {length}), the plain prompt and all that follows, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must be {shapes}")


def needs_nothing(cache: Any, family: Family, mask: Tensor | None) -> bool:
    """Whether one more token sees exactly what its layers hold, so that the model can be left alone, without a mask.

    To be sure of a mask takes a wait for the device, which transformers then need not do to the same end.
    """
    if not isinstance(cache, Shortened) or not cache.shortened:
        return True
    if not isinstance(cache, DropCache) or cache.renumbered:
        return False
    if any(entry.alive is not None for entry in cache.held):
        return False
    name = str(family.language_model.config._attn_implementation)
    if name != "sdpa" and "flash" not in name:  # others are given a mask even where there is nothing to hide
        return False
    check_mask(cache, mask, 1)
    return mask is None or bool(mask[:, cache.prompt_length :].all())
