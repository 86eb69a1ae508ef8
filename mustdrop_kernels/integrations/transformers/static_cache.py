# SPDX-License-Identifier: Apache-2.0
"""A static KV cache, with buffers of fixed size and address for compiled decoding, from which tokens are dropped.

The remaining tokens move to the front of their layer's buffer, and decoding writes after them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from .shortened_cache import CacheState, Checkpoint, LayerTokens, ShortenedCache

_STATES = len(inspect.signature(StaticLayer.lazy_initialization).parameters) - 1  # transformers 4: keys alone


class DropStaticLayer(StaticLayer):
    """A layer whose length includes dropped tokens, and which counts its filled slots itself."""

    state: CacheState
    keys: Any  # (B, Hk, size, D), once allocated
    values: Any
    cumulative_length: Tensor  # () or (1,) int64: filled slots
    dropped: Tensor  # the same shape: tokens of the plain prompt that this layer does not hold
    mode: str
    """The keys and values that attention gets: "whole", the buffers; "narrow", the filled slots; "own", the buffers,
    with the layer's own inputs. Compiled code reads it, and so recompiles for another mode."""
    end: int
    """In mode "narrow": filled slots after the pass has written its own."""

    @classmethod
    def of(cls, plain: StaticLayer, state: CacheState) -> DropStaticLayer:
        """A layer with the contents and the buffers of `plain`."""
        layer = cls(plain.max_cache_len)
        vars(layer).update(vars(plain))
        if "cumulative_length" not in vars(plain):  # transformers 4 counts nonzero keys instead
            layer.cumulative_length = torch.as_tensor(plain.get_seq_length(), device="cpu")
        layer.dropped = torch.zeros_like(layer.cumulative_length)
        layer.state, layer.mode, layer.end = state, "whole", 0
        return layer

    def lazy_initialization(self, *states: Tensor) -> None:
        """Allocates the buffers for the first keys and values."""
        super().lazy_initialization(*states)
        self.cumulative_length = self.cumulative_length.to(self.keys.device)
        self.dropped = self.dropped.to(self.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes after the filled slots, whatever cache positions the model passes."""
        if not self.is_initialized:
            self.lazy_initialization(*(key_states, value_states)[:_STATES])
        count = key_states.shape[-2]
        place = torch.arange(count, device=self.keys.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        if self.mode == "narrow":
            return self.keys[:, :, : self.end], self.values[:, :, : self.end]
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Length of the plain sequence, as a tensor, so that reading it does not synchronize with the device."""
        return self.cumulative_length + self.dropped if self.is_initialized else 0

    def reset(self) -> None:
        """Empties the layer."""
        length = self.cumulative_length
        super().reset()
        self.cumulative_length = length.zero_()  # the same tensor, which transformers 4 deletes
        self.dropped.zero_()
        self.mode = "whole"
        self.state.clear()


class DropStaticCache(ShortenedCache, StaticCache):
    """A ``StaticCache`` of the caller or of generate(), with the same layers in the same list."""

    def __init__(self, given: StaticCache) -> None:
        if given.offloading:
            raise ValueError("drop_tokens cannot shorten an offloaded static cache; pass one that stays on the device")
        Cache.__init__(self, layers=given.layers)
        other = {type(layer).__name__ for layer in self.layers if type(layer) not in (StaticLayer, DropStaticLayer)}
        if other:
            raise ValueError(f"drop_tokens needs full attention in every layer, this cache has {other}")
        self.layer_inputs = {}
        first = self.layers[0]
        if isinstance(first, DropStaticLayer):
            self.state = first.state
        else:
            self.state = CacheState(self.layers)
            self.layers[:] = [DropStaticLayer.of(layer, self.state) for layer in self.layers]

    @property
    def size(self) -> int:
        """Number of slots of a buffer."""
        return int(self.layers[0].max_cache_len)

    def limit(self, layer: int, end: int | None) -> None:
        """Limits attention of the next pass to a layer's slots before `end`; None: the whole buffer."""
        entry = self.layers[layer]
        entry.mode, entry.end = ("whole", 0) if end is None else ("narrow", end)

    def declare_layer_inputs(self) -> None:
        """Sets the mode of the layers in ``layer_inputs``."""
        for i, layer in enumerate(self.layers):
            layer.mode = "own" if i in self.layer_inputs else "whole"

    def set_layer_tokens(
        self, prompt_length: int, tokens: Sequence[LayerTokens], hidden: Tensor | None, *, renumbered: bool
    ) -> None:
        """Sets the tokens of a prompt that each layer holds, and those that its mask hid (B, prompt_length)."""
        super().set_layer_tokens(prompt_length, tokens, hidden, renumbered=renumbered)
        for layer, entry in zip(self.layers, self.layer_tokens, strict=True):
            layer.cumulative_length.fill_(entry.length)
            layer.dropped.fill_(prompt_length - entry.length)

    def store(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:  # (B, Hk, L, D) each
        """Replaces a layer's keys and values from slot `begin` on by views of its buffers at or after that slot."""
        for buffer, kept in zip(self.stored(layer, self.size), (keys, values), strict=True):
            front = buffer[:, :, begin : begin + kept.shape[2]]
            if front.data_ptr() != kept.data_ptr():
                front.copy_(kept.clone())  # they may overlap

    def checkpoint(self) -> Checkpoint:
        """The number of filled slots of each layer, and the state."""
        return self._make_checkpoint([layer.cumulative_length.clone() for layer in self.layers])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Removes what was appended since the checkpoint, after an error. Reordered rows are not restored."""
        if not any(checkpoint.lengths):
            self.reset()
        elif self.state.row_changes == checkpoint.row_changes:
            self._restore_state(checkpoint)
            for i, (layer, length) in enumerate(zip(self.layers, checkpoint.lengths, strict=True)):
                layer.cumulative_length.copy_(length)
                tokens = checkpoint.layer_tokens
                layer.dropped.fill_(checkpoint.prompt_length - tokens[i].length if tokens else 0)
                self.limit(i, None)

    def crop(self, tokens: int) -> None:
        """Removes the last -`tokens` tokens, none of a shortened prompt."""
        count = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        if self.shortened and count > self.generated:
            raise RuntimeError("a prompt that drop_tokens has shortened cannot be cropped")
        for layer in self.layers:
            layer.cumulative_length.sub_(count)
