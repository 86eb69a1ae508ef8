# SPDX-License-Identifier: Apache-2.0
"""What is known of a cache whose layers hold fewer tokens than the prompt had: the same for every kind of cache."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import TokenType
from ...stages import Tokens


class Lifetime:
    """Whether a ``drop_tokens`` context is open. Copies of a cache share it; outside of a process it is over."""

    def __init__(self, is_open: bool = True) -> None:
        self.open = is_open
        self._watched: weakref.WeakSet[Books] = weakref.WeakSet()

    def watch(self, books: Books) -> None:
        """Closes the books of a cache when the context ends."""
        self._watched.add(books)

    def end(self) -> None:
        """From now on nobody makes masks for shortened caches."""
        self.open = False
        for books in self._watched:
            books.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lifetime:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Lifetime, (False,)


@dataclasses.dataclass(eq=False)
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

    lengths: list[Any]  # slots per layer, int or () int64
    held: list[Held]
    prompt_length: int
    renumbered: bool
    changes: int


@dataclasses.dataclass(eq=False)
class Books:
    """The books of one cache, which are closed when the context ends: then a shortened cache takes nothing more."""

    layers: list[Any]  # the cache's own list
    lifetime: Lifetime = dataclasses.field(default_factory=Lifetime)
    held: list[Held] = dataclasses.field(default_factory=list)
    """Per layer, shared by layers that hold the same tokens; empty: nothing was dropped."""
    prompt_length: int = 0
    """Of the plain prompt, padding included."""
    renumbered: bool = False
    """Positions count what a layer holds."""
    changes: int = 0
    """Of the batch's rows."""

    def enter(self, lifetime: Lifetime) -> None:
        """Belongs to this context from now on."""
        if self.lifetime is not lifetime:
            self.lifetime = lifetime
            self._open()
        lifetime.watch(self)

    def close(self) -> None:
        """Without anybody who makes masks for it, a shortened cache refuses."""
        if self.held:
            for layer in self.layers:
                layer.update = _refused_update  # an attribute, so that it costs nothing while the context is open

    def _open(self) -> None:
        for layer in self.layers:
            vars(layer).pop("update", None)

    def forget(self) -> None:
        """The cache is empty."""
        self.held, self.prompt_length, self.renumbered = [], 0, False
        self._open()

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does to the batch what was done to keys and values."""
        self.changes += 1
        for entry in {id(entry): entry for entry in self.held}.values():
            entry.change_rows(change)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.lifetime.open:
            self.lifetime.watch(self)
        else:
            self.close()


def _refused_update(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("this cache was shortened by drop_tokens; it can only be continued inside drop_tokens")


class Shortened:
    """What caches that lose tokens have in common; each of them adds how its layers keep keys and values."""

    layers: list[Any]
    books: Books
    own: dict[int, dict[str, Any]]
    """Of the pass that runs: inputs of the layers that do not take what the model gives to all."""

    @property
    def held(self) -> list[Held]:
        """The prompt tokens that each layer holds; empty: all of them."""
        return self.books.held

    @property
    def prompt_length(self) -> int:
        """Of the plain prompt, padding included."""
        return self.books.prompt_length

    @property
    def renumbered(self) -> bool:
        """Positions count what a layer holds."""
        return self.books.renumbered

    @property
    def shortened(self) -> bool:
        """Whether tokens were dropped."""
        return bool(self.books.held)

    @property
    def seen(self) -> int:
        """Length of the plain sequence so far; a static cache waits for the device."""
        return int(self.get_seq_length())  # type: ignore[attr-defined]

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return self.seen - self.prompt_length

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one position of one layer, of the whole batch."""
        layer = self.layers[0]
        return sum(x[:, :, 0].numel() * x.element_size() for x in (layer.keys, layer.values))

    def past(self, mask: Tensor | None, batch: int, device: torch.device) -> list[Held]:
        """What each layer holds by now, tokens behind the prompt too. `mask` (B, plain length or more): real tokens."""
        seen, begin = self.seen, self.prompt_length if self.shortened else 0
        alive = None if mask is None else mask[:, begin:seen].bool()
        whole = torch.full((batch,), seen - begin, dtype=torch.int32, device=device)
        behind = Held(seen - begin, whole if alive is None else alive.sum(1, dtype=torch.int32), alive)
        if not self.shortened:
            return [behind] * len(self.layers)
        entries = {id(entry): entry.followed_by(behind) for entry in self.held}
        return [entries[id(entry)] for entry in self.held]

    def shorten(self, prompt_length: int, held: Sequence[Held], *, renumbered: bool) -> None:
        """Declares what each layer holds of a prompt of this length."""
        books = self.books
        books.held, books.prompt_length, books.renumbered = list(held), prompt_length, renumbered

    def stored(self, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:  # (B, Hk, length, D) each
        """The keys and values of a layer: of so many slots, or of all that it has."""
        entry = self.layers[layer]
        return entry.keys[:, :, :length], entry.values[:, :, :length]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.books.change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.books.change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.books.change_rows(lambda rows: rows[indices])

    def mark(self) -> Mark:
        """How far it is filled now."""
        raise NotImplementedError

    def back_to(self, mark: Mark) -> None:
        """Takes off what was appended since, after an error. Rows that beams have reordered stay where they are."""
        raise NotImplementedError

    def _marked(self, lengths: list[Any]) -> Mark:
        books = self.books
        return Mark(lengths, list(books.held), books.prompt_length, books.renumbered, books.changes)

    def _restored(self, mark: Mark) -> None:
        books = self.books
        books.held, books.prompt_length, books.renumbered = list(mark.held), mark.prompt_length, mark.renumbered
