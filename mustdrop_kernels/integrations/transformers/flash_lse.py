# SPDX-License-Identifier: Apache-2.0
"""The lse of each attention row, captured from flash attention, so that scoring does not compute it again.

The functions of flash-attention 2 and 3 can return the logarithm of the sum of exponentials (lse), which transformers
does not request. They are wrapped while a scored layer attends, and their lse is captured.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from .patching import patch

FLAGS = ("return_attn_probs", "return_softmax_lse", "return_lse")  # the name depends on the version
_lock = threading.Lock()  # all threads share the replaced function


class RowLse:
    """The lse of one layer's rows."""

    def __init__(self, query: Tensor, mask: Tensor | None) -> None:  # (B, Hq, L, D); (B, keys), nonzero: real
        self.query, self.mask = query, mask
        self._captured: list[Tensor] = []

    def wrap(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A function of flash attention with its lse captured."""
        if function is None:
            return None
        flags = {flag: True for flag in FLAGS if flag in inspect.signature(function).parameters}

        def call(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(query, *args, **kwargs, **flags)
            if isinstance(result, tuple) and query.dtype == self.query.dtype:  # scores of rounded queries differ
                self._captured.append(result[1].detach())
            return result

        return call

    def read(self) -> Tensor | None:  # (B, Hq, L) float32, natural logarithm; undefined in padded rows
        """None if nothing was captured, or in an unknown layout."""
        batch, heads, length, _ = self.query.shape
        lse = self._captured[0] if len(self._captured) == 1 else None
        if lse is None or lse.dtype != torch.float32:
            return None
        if self.mask is None:
            return lse if lse.shape == (batch, heads, length) else None
        if lse.dim() != 2 or lse.shape[0] != heads:  # another layout before 2.6
            return None
        real = self.mask[:, -length:].flatten().long()  # the packed rows
        return lse[:, (real.cumsum(0) - 1).clamp(min=0)].view(heads, batch, length).transpose(0, 1)


@contextlib.contextmanager
def captured_lse(query: Tensor, mask: Any) -> Iterator[RowLse]:
    """Captures the lse of the rows of `query` (B, Hq, L, D) from this thread's calls of flash attention."""
    rows, thread = RowLse(query, mask), threading.get_ident()
    plain = flash.lazy_import_flash_attention

    def functions(*args: Any, **kwargs: Any) -> Any:
        (dense, packed, *others), more = plain(*args, **kwargs)
        if threading.get_ident() != thread:
            return (dense, packed, *others), more
        return (rows.wrap(dense), rows.wrap(packed), *others), more

    with _lock, contextlib.ExitStack() as stack:
        patch(stack, flash, "lazy_import_flash_attention", functions)
        yield rows
