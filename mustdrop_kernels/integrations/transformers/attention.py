# SPDX-License-Identifier: Apache-2.0
"""The doors into attention: queries and keys after RoPE, and masks for layers of different length."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .flash_lse import asked_for_lse

NAME = "mustdrop"


def watched_config(config: Any, look: Callable[[Tensor, Tensor, float], None] | None = None) -> Any:
    """A copy of a config that sends an attention module through ``watched_attention``, and so to `look`."""
    watched = copy.copy(config)
    watched._attn_implementation = NAME
    watched.plain_config, watched.look = config, look
    return watched


def watched_attention(
    module: Any,
    query: Tensor,  # (B, Hq, L, D) after RoPE
    key: Tensor,  # (B, Hk, L, D) after RoPE
    value: Tensor,  # (B, Hk, L, D)
    attention_mask: Any,
    mustdrop: Any = None,  # the Prefill, if a prompt with images is being read
    **kwargs: Any,
) -> Any:
    """The attention that the model was set to, and a look at its queries and keys."""
    watched = module.config
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, module, "config", watched)
        module.config = watched.plain_config  # flash attention finds its kernel by the name that stands there
        asks = mustdrop is not None and "flash" in str(module.config._attn_implementation)
        rows = stack.enter_context(asked_for_lse(query, attention_mask)) if asks else None
        output = _implementation(module)(module, query, key, value, attention_mask, **kwargs)
    if watched.look is not None:
        watched.look(query, key, kwargs["scaling"])
    if mustdrop is not None:
        mustdrop.attended(module.layer_idx, query, key, kwargs["scaling"], lse=None if rows is None else rows.read())
    return output


def _implementation(module: Any) -> Callable[..., Any]:
    name = module.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # each model brings its own


AttentionInterface.register(NAME, watched_attention)


class _Past:
    """Says to transformers' mask function, in place of a cache, how many tokens stand before the new ones."""

    def __init__(self, length: int | Tensor, size: int | None) -> None:
        self.length, self.size = length, size
        self.is_compileable = size is not None  # then a mask is made even where all is seen, as for a static cache

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.length

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # what earlier versions of transformers 5 ask for
        return self.length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        if self.size is not None:
            return self.size, 0
        new = query if isinstance(query, int) else query.shape[0]
        return int(self.length) + new, 0


_create_causal_mask: Callable[..., Any] = masking_utils.create_causal_mask
_MASK_ARGUMENTS = inspect.signature(_create_causal_mask).parameters


def causal_mask(
    config: Any,
    hidden: Tensor,  # (B, L, C) of the new tokens
    alive: Tensor | None,  # (B, past + L) bool; None: no padding
    past: int | Tensor,
    size: int | None = None,
) -> Any:
    """transformers' own causal mask, in the form that the model's attention takes, for `past` tokens before these.

    With `size`, for buffers of so many slots whose first `past` ones are filled; `past` may be on the device then.
    """
    arguments: dict[str, Any] = {"config": config, "attention_mask": alive}
    arguments["cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"] = _Past(past, size)
    if "inputs_embeds" in _MASK_ARGUMENTS:  # transformers 5
        return _create_causal_mask(**arguments, inputs_embeds=hidden)
    positions = torch.arange(hidden.shape[1], device=hidden.device) + past
    return _create_causal_mask(**arguments, input_embeds=hidden, cache_position=positions)


def padding_mask(config: Any, real: Tensor, dtype: torch.dtype) -> Tensor:
    """A vision layer's mask for (B, S) real tokens, in the form that its attention takes."""
    if "flash" in str(config._attn_implementation):
        return real.long()
    batch, length = real.shape
    mask = torch.zeros(batch, 1, length, length, dtype=dtype, device=real.device)
    return mask.masked_fill(~real[:, None, None, :], torch.finfo(dtype).min)
