# SPDX-License-Identifier: Apache-2.0
"""A KV cache in buffers of a fixed size at fixed addresses, for compiled decoding, in which tokens are dropped too.

Survivors move to the front of their layer's buffer, and decoding writes behind them. The buffers stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from .shortened_cache import Books, Held, Mark, Shortened

_STATES = len(inspect.signature(StaticLayer.lazy_initialization).parameters) - 1  # transformers 4: keys alone


class DropStaticLayer(StaticLayer):
    """A layer that counts dropped tokens as seen, and knows itself where the next token is written."""

    books: Books
    keys: Any  # (B, Hk, size, D), once there is something
    values: Any
    cumulative_length: Tensor  # () or (1,) int64: slots that are filled
    dropped: Tensor  # the same shape: slots of the plain prompt that this layer does not hold
    mode: str
    """What attention gets to see: "whole", the buffers; "narrow", what is filled; "own", the buffers, with inputs of
    its own. Compiled code must not be taken for another mode: this is read there, so it is guarded."""
    end: int
    """In mode "narrow": slots that are filled once the pass has written its own."""

    @classmethod
    def of(cls, plain: StaticLayer, books: Books) -> DropStaticLayer:
        """What was stored in `plain` so far, in the same buffers."""
        layer = cls(plain.max_cache_len)
        vars(layer).update(vars(plain))
        if "cumulative_length" not in vars(plain):  # transformers 4 looks at the keys instead
            layer.cumulative_length = torch.as_tensor(plain.get_seq_length())
        layer.dropped = torch.zeros_like(layer.cumulative_length)
        layer.books, layer.mode, layer.end = books, "whole", 0
        return layer

    def lazy_initialization(self, *states: Tensor) -> None:
        """Allocates the buffers, when it is known what for."""
        super().lazy_initialization(*states)
        self.cumulative_length = self.cumulative_length.to(self.keys.device)
        self.dropped = self.dropped.to(self.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes behind what is filled, wherever the model thinks that it is."""
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
        """Length of the plain sequence, a tensor so that nobody waits for the device."""
        return self.cumulative_length + self.dropped if self.is_initialized else 0

    def reset(self) -> None:
        """Forgets everything."""
        length = self.cumulative_length
        super().reset()
        self.cumulative_length = length.zero_()  # the same tensor, which transformers 4 takes away
        self.dropped.zero_()
        self.mode = "whole"
        self.books.forget()


class DropStaticCache(Shortened, StaticCache):
    """What is known of a caller's ``StaticCache``, or of generate()'s: it has the same layers, in the same list."""

    def __init__(self, given: StaticCache) -> None:
        if given.offloading:
            raise ValueError("drop_tokens cannot shorten an offloaded static cache; take one that stays on the device")
        Cache.__init__(self, layers=given.layers)
        other = {type(layer).__name__ for layer in self.layers if type(layer) not in (StaticLayer, DropStaticLayer)}
        if other:
            raise ValueError(f"drop_tokens needs full attention in every layer, this cache has {other}")
        self.own = {}
        first = self.layers[0]
        if isinstance(first, DropStaticLayer):
            self.books = first.books
        else:
            self.books = Books(self.layers)
            self.layers[:] = [DropStaticLayer.of(layer, self.books) for layer in self.layers]

    @property
    def size(self) -> int:
        """Slots of a buffer."""
        return int(self.layers[0].max_cache_len)

    def show(self, layer: int, end: int | None) -> None:
        """What the next pass sees of a layer: the slots before `end`, or, with None, the whole buffer."""
        entry = self.layers[layer]
        entry.mode, entry.end = ("whole", 0) if end is None else ("narrow", end)

    def declare_own(self) -> None:
        """Says so in the layers which have inputs of their own."""
        for i, layer in enumerate(self.layers):
            layer.mode = "own" if i in self.own else "whole"

    def shorten(self, prompt_length: int, held: Sequence[Held], *, renumbered: bool) -> None:
        """Declares what each layer holds of a prompt of this length."""
        super().shorten(prompt_length, held, renumbered=renumbered)
        for layer, entry in zip(self.layers, self.held, strict=True):
            layer.cumulative_length.fill_(entry.length)
            layer.dropped.fill_(prompt_length - entry.length)

    def store(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:  # (B, Hk, L, D) each
        """From slot `begin` on, a layer has these, which are views of its buffers further back or just there."""
        for buffer, kept in zip(self.stored(layer, self.size), (keys, values), strict=True):
            front = buffer[:, :, begin : begin + kept.shape[2]]
            if front.data_ptr() != kept.data_ptr():
                front.copy_(kept.clone())  # they may overlap

    def mark(self) -> Mark:
        """The slots that are filled now."""
        return self._marked([layer.cumulative_length.clone() for layer in self.layers])

    def back_to(self, mark: Mark) -> None:
        """Takes off what was appended since, after an error. Rows that beams have reordered stay where they are."""
        if not any(mark.lengths):
            self.reset()
        elif self.books.changes == mark.changes:
            self._restored(mark)
            for i, (layer, length) in enumerate(zip(self.layers, mark.lengths, strict=True)):
                layer.cumulative_length.copy_(length)
                layer.dropped.fill_(mark.prompt_length - mark.held[i].length if mark.held else 0)
                self.show(i, None)

    def crop(self, tokens: int) -> None:
        """Takes the last -`tokens` away, but for none of the prompt."""
        count = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        if self.shortened and count > self.generated:
            raise RuntimeError("a prompt that drop_tokens has shortened cannot be cropped")
        for layer in self.layers:
            layer.cumulative_length.sub_(count)


def books_of(cache: Any) -> Any:
    """The cache itself; for a ``StaticCache`` whose layers have lost tokens what knows of them."""
    ours = isinstance(cache, StaticCache) and isinstance(cache.layers[0], DropStaticLayer)
    return DropStaticCache(cache) if ours and not isinstance(cache, DropStaticCache) else cache
