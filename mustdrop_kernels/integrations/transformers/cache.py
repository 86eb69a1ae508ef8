# SPDX-License-Identifier: Apache-2.0
"""A KV cache whose layers hold fewer tokens than the prompt had, each its own number of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...ops import TokenType
from ...stages import Tokens


class Lifetime:
    """Whether a ``drop_tokens`` context is open. Copies of a cache share it."""

    def __init__(self) -> None:
        self.open = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Lifetime:
        return self


@dataclasses.dataclass
class Held:
    """The prompt tokens that some layers of the cache hold."""

    length: int  # padding included
    counts: Tensor  # (B) real tokens of each sequence
    alive: Tensor | None  # (B, length) bool; None: no padding

    @classmethod
    def of(cls, tokens: Tokens) -> Held:
        alive = tokens.types != TokenType.PADDING if tokens.padded else None
        return cls(tokens.length, tokens.counts, alive)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.counts = change(self.counts)
        self.alive = None if self.alive is None else change(self.alive)


class DropLayer(DynamicLayer):
    """A layer that counts dropped tokens as seen: generate() and RoPE go by the plain prompt's length."""

    is_croppable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropped = 0  # slots of the plain prompt that this layer does not hold

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset for a mask, as a sliding layer has them; transformers 4 passes positions, 5 a length."""
        new = query if isinstance(query, int) else query.shape[0]
        return super().get_seq_length() + new, self.dropped

    def crop(self, *args: Any, **kwargs: Any) -> None:
        if self.dropped:
            raise RuntimeError("a cache that drop_tokens has shortened cannot be cropped")
        super().crop(*args, **kwargs)


class DropCache(DynamicCache):
    """``DynamicCache`` until a prompt's tokens are dropped; then ``held`` says what each layer still has."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        other = {type(layer).__name__ for layer in self.layers if type(layer) is not DynamicLayer}
        if other:
            raise ValueError(f"drop_tokens needs full attention in every layer, this model's cache has {other}")
        self.layers = [DropLayer() for _ in self.layers]
        self.held: list[Held] = []  # per layer, shared by layers that hold the same tokens; empty: nothing dropped
        self.prompt_length = 0  # of the plain prompt, padding included
        self.lifetime = Lifetime()

    @property
    def shortened(self) -> bool:
        return bool(self.held)

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return self.get_seq_length() - self.prompt_length

    def shorten(self, prompt_length: int, held: Sequence[Tokens]) -> None:
        """Declares what each layer holds of a prompt of this length."""
        entries = {id(tokens): Held.of(tokens) for tokens in held}
        self.held = [entries[id(tokens)] for tokens in held]
        self.prompt_length = prompt_length
        for layer, entry in zip(self.layers, self.held):
            layer.dropped = prompt_length - entry.length

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.shortened and not self.lifetime.open:
            raise RuntimeError("this cache was shortened by drop_tokens; it can only be continued inside drop_tokens")
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])

    def reset(self) -> None:
        super().reset()
        self.held, self.prompt_length = [], 0
        for layer in self.layers:
            layer.dropped = 0

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for entry in {id(entry): entry for entry in self.held}.values():
            entry.change_rows(change)


class Past:
    """Says to transformers' mask functions, in place of a cache, how many tokens stand before the new ones."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self.length = length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        new = query if isinstance(query, int) else query.shape[0]
        return self.length + new, 0
