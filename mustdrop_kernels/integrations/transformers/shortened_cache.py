# SPDX-License-Identifier: Apache-2.0
"""State of a cache whose layers hold fewer tokens than the prompt had, common to all kinds of caches."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import TokenType
from ...stages import Tokens


class ContextLifetime:
    """Whether a ``drop_tokens`` context is open. Copies of a cache share it; it is closed in a pickle."""

    def __init__(self, is_open: bool = True) -> None:
        self.open = is_open
        self._states: weakref.WeakSet[CacheState] = weakref.WeakSet()

    def register(self, state: CacheState) -> None:
        """Registers the state of a cache, to be closed when the context ends."""
        self._states.add(state)

    def end(self) -> None:
        """Closes all registered states: without the context no masks are made for shortened caches."""
        self.open = False
        for state in self._states:
            state.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextLifetime:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextLifetime, (False,)


@dataclasses.dataclass(eq=False)
class LayerTokens:
    """The prompt tokens that some layers of a cache hold."""

    length: int  # padding included
    counts: Tensor  # (B) real tokens of each sequence
    alive: Tensor | None  # (B, length) bool; None: no padding
    index: Tensor  # (B, length) int64, place in the plain sequence; undefined in padding

    @classmethod
    def of(cls, tokens: Tokens, begin: int) -> LayerTokens:
        """The part of `tokens` that is needed after the prompt, which is at `begin` of the plain sequence."""
        alive = tokens.types != TokenType.PADDING if tokens.padded else None
        return cls(tokens.length, tokens.counts, alive, tokens.index + begin)

    def followed_by(self, other: LayerTokens) -> LayerTokens:
        """These tokens followed by others."""
        alive = None
        if self.alive is not None or other.alive is not None:
            alive = torch.cat([self.real(), other.real()], dim=1)
        index = torch.cat([self.index, other.index], dim=1)
        return LayerTokens(self.length + other.length, self.counts + other.counts, alive, index)

    def real(self) -> Tensor:  # (B, length) bool
        """False in padding."""
        if self.alive is not None:
            return self.alive
        return torch.ones(len(self.counts), self.length, dtype=torch.bool, device=self.counts.device)

    def shown(self, mask: Tensor | None) -> Tensor:  # (B, plain length or more), nonzero: shown -> (B, length) bool
        """False in padding, and where a later mask hides a token."""
        if mask is None:
            return self.real()
        return self.real() & mask.bool().gather(1, self.index.clamp(min=0))

    def masked(self, mask: Tensor | None) -> LayerTokens:
        """These tokens without those that a later mask hides. Synchronizes with the device if there is a mask."""
        shown = self.shown(mask)
        return self if torch.equal(shown, self.real()) else dataclasses.replace(self, alive=shown)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the rows of the batch, as to keys and values."""
        self.counts, self.index = change(self.counts), change(self.index)
        self.alive = None if self.alive is None else change(self.alive)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Fill level and state of a cache."""

    lengths: list[Any]  # slots per layer, int or () int64
    layer_tokens: list[LayerTokens]
    prompt_length: int
    renumbered: bool
    hidden: Tensor | None
    row_changes: int


@dataclasses.dataclass(eq=False)
class CacheState:
    """Tokens in the layers of one cache. Closed when the context ends: a shortened cache rejects updates then."""

    layers: list[Any]  # the cache's own list
    lifetime: ContextLifetime = dataclasses.field(default_factory=ContextLifetime)
    layer_tokens: list[LayerTokens] = dataclasses.field(default_factory=list)
    """Per layer, shared by layers that hold the same tokens; empty if nothing was dropped."""
    prompt_length: int = 0
    """Length of the plain prompt, padding included."""
    renumbered: bool = False
    """Positions count what a layer holds."""
    hidden: Tensor | None = None
    """(B, prompt_length) bool: tokens of the plain prompt that its mask hid; None: no token."""
    row_changes: int = 0
    """Number of changes of the batch's rows."""

    def bind(self, lifetime: ContextLifetime) -> None:
        """Binds the cache to a context."""
        if self.lifetime is not lifetime:
            self.lifetime = lifetime
            self._open()
        lifetime.register(self)

    def close(self) -> None:
        """Makes a shortened cache reject updates."""
        if self.layer_tokens:
            for layer in self.layers:
                layer.update = _rejected_update  # an attribute of the layer, so that open caches have no overhead

    def _open(self) -> None:
        for layer in self.layers:
            vars(layer).pop("update", None)

    def clear(self) -> None:
        """Clears the state of an empty cache."""
        self.layer_tokens, self.prompt_length, self.renumbered, self.hidden = [], 0, False, None
        self._open()

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the rows of the batch, as to keys and values."""
        self.row_changes += 1
        self.hidden = None if self.hidden is None else change(self.hidden)
        for entry in {id(entry): entry for entry in self.layer_tokens}.values():
            entry.change_rows(change)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.lifetime.open:
            self.lifetime.register(self)
        else:
            self.close()


def _rejected_update(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("this cache was shortened by drop_tokens; it can only be continued inside drop_tokens")


class ShortenedCache:
    """Base of caches that lose tokens; subclasses add the storage of keys and values."""

    layers: list[Any]
    state: CacheState
    layer_inputs: dict[int, dict[str, Any]]
    """By layer, in the current pass: inputs that replace those which the model passes to all layers."""

    @property
    def layer_tokens(self) -> list[LayerTokens]:
        """The prompt tokens that each layer holds; empty if all hold the whole prompt."""
        return self.state.layer_tokens

    @property
    def prompt_length(self) -> int:
        """Length of the plain prompt, padding included."""
        return self.state.prompt_length

    @property
    def renumbered(self) -> bool:
        """Positions count what a layer holds."""
        return self.state.renumbered

    @property
    def shortened(self) -> bool:
        """Whether tokens were dropped."""
        return bool(self.state.layer_tokens)

    @property
    def seen(self) -> int:
        """Length of the plain sequence so far; a static cache synchronizes with the device."""
        return int(self.get_seq_length())  # type: ignore[attr-defined]

    @property
    def generated(self) -> int:
        """Number of tokens after the prompt."""
        return self.seen - self.prompt_length

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one position of one layer, for the whole batch."""
        layer = self.layers[0]
        return sum(x[:, :, 0].numel() * x.element_size() for x in (layer.keys, layer.values))

    def past_tokens(self, mask: Tensor | None, batch: int, device: torch.device) -> list[LayerTokens]:
        """The tokens of each layer, those after the prompt included. `mask` (B, plain length or more): shown tokens."""
        seen, begin = self.seen, self.prompt_length if self.shortened else 0
        alive = None if mask is None else mask[:, begin:seen].bool()
        whole = torch.full((batch,), seen - begin, dtype=torch.int32, device=device)
        counts = whole if alive is None else alive.sum(1, dtype=torch.int32)
        index = torch.arange(begin, seen, device=device).expand(batch, -1)
        later = LayerTokens(seen - begin, counts, alive, index)
        if not self.shortened:
            return [later] * len(self.layers)
        entries = {id(entry): entry.masked(mask).followed_by(later) for entry in self.layer_tokens}
        return [entries[id(entry)] for entry in self.layer_tokens]

    def set_layer_tokens(
        self, prompt_length: int, tokens: Sequence[LayerTokens], hidden: Tensor | None, *, renumbered: bool
    ) -> None:
        """Sets the tokens of a prompt that each layer holds, and those that its mask hid (B, prompt_length)."""
        state = self.state
        state.layer_tokens, state.prompt_length, state.renumbered = list(tokens), prompt_length, renumbered
        state.hidden = hidden

    def stored(self, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:  # (B, Hk, length, D) each
        """The keys and values of a layer, of its first `length` slots or of all."""
        entry = self.layers[layer]
        return entry.keys[:, :, :length], entry.values[:, :, :length]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replaces row i by row beam_idx[i]."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.state.change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.state.change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows only."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.state.change_rows(lambda rows: rows[indices])

    def checkpoint(self) -> Checkpoint:
        """The current fill level and state."""
        raise NotImplementedError

    def restore(self, checkpoint: Checkpoint) -> None:
        """Removes what was appended since the checkpoint, after an error. Reordered rows are not restored."""
        raise NotImplementedError

    def _make_checkpoint(self, lengths: list[Any]) -> Checkpoint:
        state = self.state
        tokens = list(state.layer_tokens)
        return Checkpoint(lengths, tokens, state.prompt_length, state.renumbered, state.hidden, state.row_changes)

    def _restore_state(self, checkpoint: Checkpoint) -> None:
        state = self.state
        state.layer_tokens, state.prompt_length = list(checkpoint.layer_tokens), checkpoint.prompt_length
        state.renumbered, state.hidden = checkpoint.renumbered, checkpoint.hidden
