# SPDX-License-Identifier: Apache-2.0
"""A KV cache that grows, and whose layers shrink, each by its own number of tokens, when tokens are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .shortened_cache import Books, Held, Mark, Shortened


class DropLayer(DynamicLayer):
    """A layer that counts dropped tokens as seen: generate() and RoPE go by the plain prompt's length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropped = 0  # slots of the plain prompt that this layer does not hold

    def get_seq_length(self) -> int:
        """Length of the plain sequence."""
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset for a mask, as a sliding layer has them; transformers 4 passes positions, 5 a length."""
        new = query if isinstance(query, int) else query.shape[0]
        return super().get_seq_length() + new, self.dropped

    def crop(self, tokens: int) -> None:
        """Takes the last -`tokens` away."""
        if tokens < 0 and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :tokens, :], self.values[..., :tokens, :]


class DropCache(Shortened, DynamicCache):
    """A ``DynamicCache`` until tokens of its prompt are dropped; then ``held`` says what each layer still has."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        other = {type(layer).__name__ for layer in self.layers if type(layer) is not DynamicLayer}
        if other:
            raise ValueError(f"drop_tokens needs full attention in every layer, this model's cache has {other}")
        self.books = Books(self.layers)
        self.own = {}
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.layers[:] = [DropLayer() for _ in self.layers]
        self.books.forget()

    def shorten(self, prompt_length: int, held: Sequence[Held], *, renumbered: bool) -> None:
        """Declares what each layer holds of a prompt of this length."""
        super().shorten(prompt_length, held, renumbered=renumbered)
        for layer, entry in zip(self.layers, self.held, strict=True):
            layer.dropped = prompt_length - entry.length

    def store(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:  # (B, Hk, L, D) each
        """From slot `begin` on, a layer has these."""
        entry = self.layers[layer]
        if begin:
            keys = torch.cat([entry.keys[:, :, :begin], keys], dim=2)
            values = torch.cat([entry.values[:, :, :begin], values], dim=2)
        entry.keys, entry.values = keys, values

    def mark(self) -> Mark:
        """The slots that are filled now."""
        return self._marked([layer.get_seq_length() - layer.dropped for layer in self.layers])

    def back_to(self, mark: Mark) -> None:
        """Takes off what was appended since, after an error. Rows that beams have reordered stay where they are."""
        if not any(mark.lengths):
            self.reset()
        elif self.books.changes == mark.changes:
            for i, length in enumerate(mark.lengths):
                self.store(i, 0, *self.stored(i, length))
            self._restored(mark)

    def crop(self, tokens: int) -> None:
        """Takes the last -`tokens` away, but for none of the prompt; a length instead, as transformers 4 passes it."""
        count = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        if self.shortened and count > self.generated:
            raise RuntimeError("a prompt that drop_tokens has shortened cannot be cropped")
        for layer in self.layers:
            layer.crop(-count)
