# SPDX-License-Identifier: Apache-2.0
"""A dynamic KV cache from which tokens are dropped, a different number in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .shortened_cache import CacheState, Checkpoint, LayerTokens, ShortenedCache


class DropLayer(DynamicLayer):
    """A layer whose length includes dropped tokens: generate() and RoPE use the plain prompt's length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropped = 0  # tokens of the plain prompt that this layer does not hold

    @classmethod
    def of(cls, plain: DynamicLayer) -> DropLayer:
        """A layer with the contents of `plain`."""
        layer = cls()
        vars(layer).update(vars(plain))
        return layer

    def get_seq_length(self) -> int:
        """Length of the plain sequence."""
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset for a mask, as of a sliding layer; transformers 4 passes positions, 5 a length."""
        new = query if isinstance(query, int) else query.shape[0]
        return super().get_seq_length() + new, self.dropped

    def crop(self, tokens: int) -> None:
        """Removes the last -`tokens` tokens."""
        if tokens < 0 and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :tokens, :], self.values[..., :tokens, :]


class DropCache(ShortenedCache, DynamicCache):
    """A ``DynamicCache`` whose prompt can lose tokens; ``layer_tokens`` holds the remaining ones of each layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._prepare(config)

    @classmethod
    def adopt(cls, given: DynamicCache, config: Any) -> DropCache:  # config of the language model
        """Turns a cache of the caller into a ``DropCache`` with the same contents; it stays the same object.

        Raises:
            ValueError: the cache is offloaded, or some of its layers hold less than all tokens.
        """
        if given.offloading:
            raise ValueError("drop_tokens cannot shorten an offloaded cache; pass one that stays on the device")
        _check_layers(given.layers)
        given.__class__ = cls
        assert isinstance(given, DropCache)
        given._prepare(config)
        return given

    def _prepare(self, config: Any) -> None:
        _check_layers(self.layers)
        depth = config.num_hidden_layers
        self.layers += [DynamicLayer() for _ in range(depth - len(self.layers))]  # without a config layers come later
        self.layers[:] = [DropLayer.of(layer) for layer in self.layers]
        self.state = CacheState(self.layers)
        self.layer_inputs = {}

    def reset(self) -> None:
        """Empties the cache."""
        self.layers[:] = [DropLayer() for _ in self.layers]
        self.state.clear()

    def set_layer_tokens(
        self, prompt_length: int, tokens: Sequence[LayerTokens], hidden: Tensor | None, *, renumbered: bool
    ) -> None:
        """Sets the tokens of a prompt that each layer holds, and those that its mask hid (B, prompt_length)."""
        super().set_layer_tokens(prompt_length, tokens, hidden, renumbered=renumbered)
        for layer, entry in zip(self.layers, self.layer_tokens, strict=True):
            layer.dropped = prompt_length - entry.length

    def store(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:  # (B, Hk, L, D) each
        """Replaces a layer's keys and values from slot `begin` on."""
        entry = self.layers[layer]
        if begin:
            keys = torch.cat([entry.keys[:, :, :begin], keys], dim=2)
            values = torch.cat([entry.values[:, :, :begin], values], dim=2)
        entry.keys, entry.values = keys, values

    def checkpoint(self) -> Checkpoint:
        """The number of filled slots of each layer, and the state."""
        return self._make_checkpoint([layer.get_seq_length() - layer.dropped for layer in self.layers])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Removes what was appended since the checkpoint, after an error. Reordered rows are not restored."""
        if not any(checkpoint.lengths):
            self.reset()
        elif self.state.row_changes == checkpoint.row_changes:
            for i, length in enumerate(checkpoint.lengths):
                self.store(i, 0, *self.stored(i, length))
            self._restore_state(checkpoint)

    def crop(self, tokens: int) -> None:
        """Removes the last -`tokens` tokens, none of a shortened prompt; transformers 4 passes the length to keep."""
        count = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        if self.shortened and count > self.generated:
            raise RuntimeError("a prompt that drop_tokens has shortened cannot be cropped")
        for layer in self.layers:
            layer.crop(-count)


def _check_layers(layers: Sequence[Any]) -> None:
    """Raises ``ValueError`` unless all layers hold all tokens."""
    other = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if other:
        raise ValueError(f"drop_tokens needs full attention in every layer, this cache has {other}")
