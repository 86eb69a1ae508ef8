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
        """What is needed of `tokens` once the prompt is read."""
        alive = tokens.types != TokenType.PADDING if tokens.padded else None
        return cls(tokens.length, tokens.counts, alive)

    def followed_by(self, other: Held) -> Held:
        """These tokens and, behind them, others."""
        alive = None
        if self.alive is not None or other.alive is not None:
            alive = torch.cat([self.real(), other.real()], dim=1)
        return Held(self.length + other.length, self.counts + other.counts, alive)

    def real(self) -> Tensor:  # (B, length) bool
        """Which are no padding."""
        if self.alive is not None:
            return self.alive
        return torch.ones(len(self.counts), self.length, dtype=torch.bool, device=self.counts.device)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does to the batch what was done to keys and values."""
        self.counts = change(self.counts)
        self.alive = None if self.alive is None else change(self.alive)


@dataclasses.dataclass(frozen=True)
class Mark:
    """How far a cache was filled."""

    lengths: list[int]  # slots per layer
    held: list[Held]
    prompt_length: int
    renumbered: bool
    changes: int


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


class DropCache(DynamicCache):
    """A ``DynamicCache`` until tokens of its prompt are dropped; then ``held`` says what each layer still has."""

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        other = {type(layer).__name__ for layer in self.layers if type(layer) is not DynamicLayer}
        if other:
            raise ValueError(f"drop_tokens needs full attention in every layer, this model's cache has {other}")
        self.lifetime = Lifetime()
        self.changes = 0  # of its rows
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.layers = [DropLayer() for _ in self.layers]
        self.held: list[Held] = []  # per layer, shared by layers that hold the same tokens; empty: nothing dropped
        self.prompt_length = 0  # of the plain prompt, padding included
        self.renumbered = False  # positions count what a layer holds

    @property
    def shortened(self) -> bool:
        """Whether tokens were dropped."""
        return bool(self.held)

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return self.get_seq_length() - self.prompt_length

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one position of one layer, of the whole batch."""
        return sum(x[:, :, 0].numel() * x.element_size() for x in self.stored(0))

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:  # (B, Hk, L, D) each
        """Keys and values of a layer."""
        return self.layers[layer].keys, self.layers[layer].values

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Puts others in their place."""
        self.layers[layer].keys, self.layers[layer].values = keys, values

    def past(self, mask: Tensor | None, batch: int, device: torch.device) -> list[Held]:
        """What each layer holds by now, tokens behind the prompt too. `mask` (B, plain length or more): real tokens."""
        seen, begin = self.get_seq_length(), self.prompt_length if self.shortened else 0
        alive = None if mask is None else mask[:, begin:seen].bool()
        whole = torch.full((batch,), seen - begin, dtype=torch.int32, device=device)
        behind = Held(seen - begin, whole if alive is None else alive.sum(1, dtype=torch.int32), alive)
        if not self.shortened:
            return [behind] * len(self.layers)
        entries = {id(entry): entry.followed_by(behind) for entry in self.held}
        return [entries[id(entry)] for entry in self.held]

    def shorten(self, prompt_length: int, held: Sequence[Held], *, renumbered: bool) -> None:
        """Declares what each layer holds of a prompt of this length."""
        self.held = list(held)
        self.prompt_length, self.renumbered = prompt_length, renumbered
        for layer, entry in zip(self.layers, self.held, strict=True):
            layer.dropped = prompt_length - entry.length

    def mark(self) -> Mark:
        """How far it is filled now."""
        lengths = [layer.get_seq_length() - layer.dropped for layer in self.layers]
        return Mark(lengths, list(self.held), self.prompt_length, self.renumbered, self.changes)

    def back_to(self, mark: Mark) -> None:
        """Takes off what was appended since, after an error. Rows that beams have reordered stay where they are."""
        if not any(mark.lengths):
            self.reset()
        elif self.changes == mark.changes:
            for i, length in enumerate(mark.lengths):
                keys, values = self.stored(i)
                self.store(i, keys[:, :, :length], values[:, :, :length])
            self.held, self.prompt_length, self.renumbered = list(mark.held), mark.prompt_length, mark.renumbered

    def crop(self, tokens: int) -> None:
        """Takes the last -`tokens` away, but for none of the prompt; a length instead, as transformers 4 passes it."""
        count = -tokens if tokens <= 0 else max(self.get_seq_length() - tokens, 0)
        if self.shortened and count > self.generated:
            raise RuntimeError("a prompt that drop_tokens has shortened cannot be cropped")
        for layer in self.layers:
            layer.crop(-count)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends to a layer; where nobody makes masks for a shortened cache, refuses."""
        if self.shortened and not self.lifetime.open:
            raise RuntimeError("this cache was shortened by drop_tokens; it can only be continued inside drop_tokens")
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.changes += 1
        for entry in {id(entry): entry for entry in self.held}.values():
            entry.change_rows(change)
