# SPDX-License-Identifier: Apache-2.0
"""The normaliser of each attention row, which flash attention has computed anyway: scores need not find it again.

flash-attention 2 and 3 hand out the logarithm of the sum of exponentials (lse) to whoever asks; transformers does not.
While a layer that is scored attends, their functions are asked, and what they say beside the output is kept.
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

FLAGS = ("return_attn_probs", "return_softmax_lse", "return_lse")  # whichever a version's functions take
_alone = threading.Lock()  # the function that is replaced is all threads'


class RowLse:
    """What flash attention has said of one layer's rows."""

    def __init__(self, query: Tensor, mask: Tensor | None) -> None:  # (B, Hq, L, D); (B, keys), nonzero: real
        self.query, self.mask = query, mask
        self._found: list[Tensor] = []

    def asking(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A function of flash attention that also gives its lse."""
        if function is None:
            return None
        flags = {flag: True for flag in FLAGS if flag in inspect.signature(function).parameters}

        def call(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(query, *args, **kwargs, **flags)
            if isinstance(result, tuple) and query.dtype == self.query.dtype:  # rounded queries have other scores
                self._found.append(result[1].detach())
            return result

        return call

    def read(self) -> Tensor | None:  # (B, Hq, L) float32, natural logarithm; of padded rows it means nothing
        """None where nothing was said, or not in a form that is known."""
        batch, heads, length, _ = self.query.shape
        lse = self._found[0] if len(self._found) == 1 else None
        if lse is None or lse.dtype != torch.float32:
            return None
        if self.mask is None:
            return lse if lse.shape == (batch, heads, length) else None
        if lse.dim() != 2 or lse.shape[0] != heads:  # before 2.6 rows lay otherwise
            return None
        real = self.mask[:, -length:].flatten().long()  # the rows that were packed, one after another
        return lse[:, (real.cumsum(0) - 1).clamp(min=0)].view(heads, batch, length).transpose(0, 1)


@contextlib.contextmanager
def asked_for_lse(query: Tensor, mask: Any) -> Iterator[RowLse]:
    """Within, this thread's calls of flash attention say what they know of the rows of `query` (B, Hq, L, D)."""
    rows, thread = RowLse(query, mask), threading.get_ident()
    plain = flash.lazy_import_flash_attention

    def functions(*args: Any, **kwargs: Any) -> Any:
        (dense, packed, *others), more = plain(*args, **kwargs)
        if threading.get_ident() != thread:
            return (dense, packed, *others), more
        return (rows.asking(dense), rows.asking(packed), *others), more

    with _alone, contextlib.ExitStack() as stack:
        patch(stack, flash, "lazy_import_flash_attention", functions)
        yield rows
