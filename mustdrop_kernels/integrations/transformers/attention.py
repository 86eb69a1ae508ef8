# SPDX-License-Identifier: Apache-2.0
"""Access to attention: queries and keys after RoPE, and masks for layers of different length."""

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

from .flash_lse import captured_lse

NAME = "mustdrop"


def hooked_config(config: Any, on_attention: Callable[[Tensor, Tensor, float], None] | None = None) -> Any:
    """A copy of a config with ``hooked_attention``, which also passes queries, keys and scale to `on_attention`."""
    hooked = copy.copy(config)
    hooked._attn_implementation = NAME
    hooked.plain_config, hooked.on_attention = config, on_attention
    return hooked


def hooked_attention(
    module: Any,
    query: Tensor,  # (B, Hq, L, D) after RoPE
    key: Tensor,  # (B, Hk, L, D) after RoPE
    value: Tensor,  # (B, Hk, L, D)
    attention_mask: Any,
    drop_step: Any = None,  # a DropStep, while a prompt with images is read
    **kwargs: Any,
) -> Any:
    """The model's own attention; its queries and keys are passed on."""
    hooked = module.config
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, module, "config", hooked)
        module.config = hooked.plain_config  # flash attention finds its kernel by the name in the config
        capture = drop_step is not None and "flash" in str(module.config._attn_implementation)
        rows = stack.enter_context(captured_lse(query, attention_mask)) if capture else None
        output = _implementation(module)(module, query, key, value, attention_mask, **kwargs)
    if hooked.on_attention is not None:
        hooked.on_attention(query, key, kwargs["scaling"])
    if drop_step is not None:
        drop_step.on_attention(query, key, kwargs["scaling"], lse=None if rows is None else rows.read())
    return output


def _implementation(module: Any) -> Callable[..., Any]:
    name = module.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # each model has its own


AttentionInterface.register(NAME, hooked_attention)


class _Past:
    """Number of tokens before the new ones, in place of a cache, for transformers' mask function."""

    def __init__(self, length: int | Tensor, size: int | None) -> None:
        self.length, self.size = length, size
        self.is_compileable = size is not None  # a mask is made even if nothing is hidden, as for a static cache

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.length

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # called by earlier versions of transformers 5
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
    """transformers' own causal mask for `past` tokens before the new ones, in the form that the attention requires.

    With `size` the mask covers buffers of so many slots, the first `past` of them filled; `past` may be a tensor then.
    """
    arguments: dict[str, Any] = {"config": config, "attention_mask": alive}
    arguments["cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"] = _Past(past, size)
    if "inputs_embeds" in _MASK_ARGUMENTS:  # transformers 5
        return _create_causal_mask(**arguments, inputs_embeds=hidden)
    positions = torch.arange(hidden.shape[1], device=hidden.device) + past
    return _create_causal_mask(**arguments, input_embeds=hidden, cache_position=positions)


def padding_mask(config: Any, real: Tensor, dtype: torch.dtype) -> Tensor:
    """A vision layer's mask for (B, S) real tokens, in the form that its attention requires."""
    if "flash" in str(config._attn_implementation):
        return real.long()
    batch, length = real.shape
    mask = torch.zeros(batch, 1, length, length, dtype=dtype, device=real.device)
    return mask.masked_fill(~real[:, None, None, :], torch.finfo(dtype).min)
