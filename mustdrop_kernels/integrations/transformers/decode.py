# SPDX-License-Identifier: Apache-2.0
"""Going on after a prompt whose tokens were dropped: by one token, or by a whole next turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import causal_mask
from .cache import DropCache, Held
from .families import Family


class Decode:
    """One forward pass on a shortened cache. Layers that hold the same tokens share mask and rotary table.

    The model would build one mask for all layers, from the plain prompt's length.
    """

    def __init__(self, family: Family, cache: DropCache, inputs: dict[str, Any]) -> None:
        self.family = family
        self.cache = cache
        self.new = inputs["inputs_embeds"].shape[1]
        self.generated = cache.generated  # before this pass
        self.behind = self._behind_prompt(inputs.get("attention_mask"))
        self._shared: dict[int, dict[str, Any]] = {}

    def _behind_prompt(self, mask: Tensor | None) -> Tensor | None:  # (B, generated + new)
        """The columns of the caller's mask that stand behind the prompt; the cache knows the prompt's."""
        if mask is None:
            return None
        length = self.cache.prompt_length + self.generated + self.new
        if mask.dim() != 2 or mask.shape[1] != length:
            shapes = f"(B, {length}), the plain prompt and all that follows, got {tuple(mask.shape)}"
            raise ValueError(f"attention_mask must be {shapes}")
        return mask[:, self.cache.prompt_length :].bool()

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs; each layer gets a mask of its own."""
        return {**inputs, "attention_mask": None}

    def layer_inputs(self, layer: int, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoder layer's inputs, for the tokens that it holds."""
        held = self.cache.held[layer]
        if id(held) not in self._shared:
            self._shared[id(held)] = self._inputs_for(held, hidden)
        return {**inputs, **self._shared[id(held)]}

    def _inputs_for(self, held: Held, hidden: Tensor) -> dict[str, Any]:
        model = self.family.language_model
        mask = causal_mask(model.config, hidden, self._alive(held, hidden), past=held.length + self.generated)
        inputs = {"attention_mask": mask}
        if self.cache.renumbered:
            place = self.generated + torch.arange(self.new, device=hidden.device)
            positions = held.counts[:, None].long() + place
            inputs["position_embeddings"] = self.family.rotary(hidden, positions)
        return inputs

    def _alive(self, held: Held, hidden: Tensor) -> Tensor | None:  # (B, held.length + generated + new)
        if held.alive is None and self.behind is None:
            return None

        def filled(mask: Tensor | None, length: int) -> Tensor:
            return mask if mask is not None else hidden.new_ones(hidden.shape[0], length, dtype=torch.bool)

        return torch.cat([filled(held.alive, held.length), filled(self.behind, self.generated + self.new)], dim=1)
