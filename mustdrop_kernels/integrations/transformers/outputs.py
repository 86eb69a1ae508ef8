# SPDX-License-Identifier: Apache-2.0
"""``logits_to_keep`` and ``labels`` of a call, which count positions of the plain prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prefill import Prefill

IGNORED = -100  # label of a row without a loss, by convention of transformers


class Outputs:
    """Takes both arguments from a model's inputs, and applies them to the rows that are left."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        keep = inputs.get("logits_to_keep", 0)
        self._keep: int | Tensor = 0 if keep is None else keep
        self._labels: Tensor | None = None
        if isinstance(self._keep, Tensor) or self._keep:
            inputs["logits_to_keep"] = 0  # the language model's output has these rows alone
        elif inputs.get("labels") is not None:
            # The model reads its labels after the language model has run, and so can be given those of the rows left.
            inputs["labels"] = self._labels = inputs["labels"].clone()

    def select(self, hidden: Tensor, prefill: Prefill | None) -> Tensor:  # (B, R, C); None: nothing was dropped
        """The hidden states of the positions of ``logits_to_keep``; shortens the labels to the rows.

        Raises:
            ValueError: one of the positions was dropped.
        """
        rows = None if prefill is None else prefill.rows
        if prefill is not None and self._labels is not None and not prefill.config.drops_nothing:
            labels = prefill.labels(self._labels, IGNORED)
            self._labels.resize_(labels.shape).copy_(labels)
        if not isinstance(self._keep, Tensor) and not self._keep:
            return hidden
        if rows is None:
            return _select(hidden, self._keep)
        assert prefill is not None
        batch, length = rows.shape
        later = hidden.shape[1] - prefill.plan.tokens.length  # an assistant's candidate tokens
        rows = torch.cat(
            [rows, torch.arange(hidden.shape[1] - later, hidden.shape[1], device="cpu").expand(batch, later)], 1
        )
        gone = torch.cat([prefill.dropped(), torch.zeros(batch, later, dtype=torch.bool, device="cpu")], 1)
        keep = self._keep.cpu() if isinstance(self._keep, Tensor) else self._keep
        if _select(gone, keep).any():
            place = torch.arange(length + later, device="cpu").expand(batch, -1)
            raise ValueError(
                f"logits_to_keep: position {int(_select(place, keep)[_select(gone, keep)][0])} of the prompt was "
                "dropped; report.last.rows maps the prompt's positions to the rows of the logits of a call without "
                "logits_to_keep"
            )
        last = torch.arange(hidden.shape[1], device="cpu").expand(batch, -1)
        if not isinstance(keep, Tensor) and torch.equal(rows[:, -keep:], last[:, -keep:]):
            return hidden[:, -keep:]
        wanted = _select(rows, keep).clamp(min=0).to(hidden.device)  # padding, whose logits mean nothing: any row
        sequence = _select(torch.arange(batch, device="cpu")[:, None].expand_as(rows), keep).to(hidden.device)
        return hidden[sequence, wanted]


def _select(x: Tensor, keep: int | Tensor) -> Tensor:  # (B, L, ...)
    """The positions that ``logits_to_keep`` names, as the model takes them."""
    if not isinstance(keep, Tensor):
        return x[:, -keep:]
    keep = keep.to(x.device)
    if keep.dim() == 1:
        return x[:, keep]
    if keep.dtype == torch.bool:
        return x[keep]
    return x[torch.arange(len(x), device=x.device)[:, None], keep]
