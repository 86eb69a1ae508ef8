# SPDX-License-Identifier: Apache-2.0
"""Attention masks of the caller: (B, L), or (B, H, L, K) with a structure that is kept for the remaining tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...ops import TokenType
from ...stages import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class GivenMask:
    """``attention_mask`` of a call: which tokens of the prompt are real, and a mask of 4 dimensions."""

    real: Tensor | None = None
    """(B, n), nonzero where there is a token, of the cached sequence and the prompt; None: everywhere."""
    dense: Tensor | None = None
    """(B, H, L, K) for K cached tokens and tokens of the prompt: True where a query attends, or added to its scores."""
    unknown: Any = None
    """A mask of another kind, of which no part can be taken."""

    def check(self, shape: torch.Size, seen: int) -> None:
        """Checks the shape for a prompt (B, L) behind `seen` cached tokens.

        Raises:
            ValueError: the mask has another shape.
        """
        batch, length = shape
        if self.dense is not None:
            rows, _, queries, keys = self.dense.shape
            if rows not in (1, batch) or queries != length or keys < seen + length:
                wanted = f"({batch}, 1 or heads, {length}, {seen + length})"
                raise ValueError(f"attention_mask must have the shape {wanted}, got {tuple(self.dense.shape)}")
        elif self.real is not None and self.real.shape != (batch, seen + length):
            beginning = f"{(batch, length)}" if not seen else f"({batch}, {seen} cached tokens + {length})"
            raise ValueError(
                f"attention_mask must have the shape of input_ids {beginning}, got {tuple(self.real.shape)}"
            )

    def real_tokens(self, placeholders: Iterable[Tensor], seen: int) -> Tensor | None:
        """(B, seen + L), nonzero where there is a token, for a prompt with placeholders (B, L) behind cached tokens.

        Of a dense mask the cached tokens, text that attends to itself and to more, and what such text or the last query
        attends to, itself or through other tokens. Rows that attend to all keys are not such text: transformers writes
        them for padding. Synchronizes with the device if the mask is dense.
        """
        if self.dense is None:
            return self.real
        vision = torch.stack(list(placeholders)).any(0)
        attended = self._attended(seen + vision.shape[1])
        count = attended.sum(2)
        real = ~vision & attended.diagonal(seen, 1, 2) & (count > 1) & (count < attended.shape[2])
        real[:, -1] = True
        real = _reached(attended, real)
        real[:, :seen] = True
        return real

    def check_queries(self, types: Tensor, seen: int) -> None:
        """Checks that a text query reaches each vision token, itself or through other tokens. `types` (B, L) uint8.

        Raises:
            ValueError: the mask separates them, as it does for several documents in one sequence.
        """
        if self.dense is None:
            return
        queries, vision = types == TokenType.QUERY, types == TokenType.VISION
        reached = _reached(self._attended(seen + types.shape[1]), queries)
        if bool((vision & ~reached[:, seen:] & queries.any(1, keepdim=True)).any()):
            raise ValueError(
                "attention_mask separates an image from the text queries, as for several documents in one sequence; "
                "give each document a sequence of the batch"
            )

    def _attended(self, keys: int) -> Tensor:  # (B or 1, L, keys) bool
        assert self.dense is not None
        return attends(self.dense[..., :keys]).any(1)

    def take(self, tokens: Tokens, seen: int) -> Tensor:  # -> (B, H, remaining, seen + remaining)
        """The dense mask of the remaining tokens; padding attends to itself alone."""
        assert self.dense is not None
        dense, index = self.dense.expand(len(tokens.types), -1, -1, -1), tokens.index
        heads, keys = dense.shape[1], seen + tokens.length
        place = torch.arange(seen, device=index.device).expand(len(index), seen)
        columns = torch.cat([place, seen + index.clamp(min=0)], 1)
        rows = dense.gather(2, index.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, dense.shape[3]))
        taken = rows.gather(3, columns[:, None, None].expand(-1, heads, tokens.length, -1))
        padding = index < 0
        nothing, self_only = (False, True) if taken.dtype == torch.bool else (torch.finfo(taken.dtype).min, 0.0)
        taken = taken.masked_fill(torch.nn.functional.pad(padding, (seen, 0))[:, None, None], nothing)
        own = torch.eye(tokens.length, dtype=torch.bool, device=index.device)
        own = torch.nn.functional.pad(own, (seen, 0)) & padding[:, :, None]
        assert taken.shape[3] == keys
        return taken.masked_fill(own[:, None], self_only)


def attends(dense: Tensor) -> Tensor:
    """bool: where a dense mask lets a query attend. Masks that are added hide by the dtype's smallest number."""
    return dense if dense.dtype == torch.bool else dense > torch.finfo(dense.dtype).min / 2


def _reached(attended: Tensor, queries: Tensor) -> Tensor:  # (B or 1, L, K), (B, L) -> (B, K) bool
    """What the queries attend to, themselves or through other tokens of the prompt. Synchronizes with the device."""
    seen = attended.shape[2] - attended.shape[1]
    reached = (queries[:, :, None] & attended).any(1)
    while not torch.equal(reached, further := reached | (reached[:, seen:, None] & attended).any(1)):
        reached = further
    return reached


def mask_of(given: Any, before: Any) -> GivenMask:
    """The mask of a pass; `before` is generate()'s own attention_mask, before it converts it for a static cache."""
    mask = given if before is None or _dims(given) == 2 else before
    if isinstance(mask, dict):  # by kind of layer, as newer models take them
        mask = mask.get("full_attention", mask)
    if mask is None or _dims(mask) == 2:
        return GivenMask(real=mask)
    if _dims(mask) == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        return GivenMask(dense=mask)
    return GivenMask(unknown=mask)


def _dims(mask: Any) -> int | None:
    return mask.dim() if isinstance(mask, Tensor) else None
