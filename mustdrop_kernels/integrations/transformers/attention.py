# SPDX-License-Identifier: Apache-2.0
"""The doors into attention: queries and keys after RoPE, and masks for layers of different length."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import Past

NAME = "mustdrop"
_TRANSFORMERS_5 = "inputs_embeds" in inspect.signature(create_causal_mask).parameters


def scoring_config(config: Any) -> Any:
    """A copy of a language model's config that sends an attention module through ``scoring_attention``."""
    scoring = copy.copy(config)
    scoring._attn_implementation = NAME
    scoring.plain_config = config
    return scoring


def scoring_attention(
    module: nn.Module,
    query: Tensor,  # (B, Hq, L, D) after RoPE
    key: Tensor,  # (B, Hk, L, D) after RoPE
    value: Tensor,  # (B, Hk, L, D)
    attention_mask: Any,
    mustdrop: Any = None,  # the prompt that is being read, if it has images
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model was set to, and a look at its queries and keys."""
    scoring = module.config
    module.config = scoring.plain_config  # flash attention finds its kernel by the name that stands there
    try:
        output = _implementation(module)(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = scoring
    if mustdrop is not None:
        mustdrop.attended(query, key, kwargs["scaling"])
    return output


def _implementation(module: nn.Module) -> Callable[..., Any]:
    name = module.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # each model brings its own


AttentionInterface.register(NAME, scoring_attention)


def causal_mask(
    config: Any,
    hidden: Tensor,  # (B, L, C) of the new tokens
    alive: Tensor | None,  # (B, past + L), nonzero where there is a token; None: everywhere
    past: int,
) -> Any:
    """transformers' own causal mask, in the form that the model's attention takes, for `past` tokens before these."""
    mask = None if alive is None else alive.long()
    if _TRANSFORMERS_5:
        return create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=mask, past_key_values=Past(past))
    position = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    return create_causal_mask(
        config=config,
        input_embeds=hidden,
        attention_mask=mask,
        cache_position=position,
        past_key_values=Past(past),
    )


def padding_mask(config: Any, real: Tensor, dtype: torch.dtype) -> Tensor:  # real (B, S) bool
    """A vision layer's mask of the real tokens of each image, in the form that its attention takes."""
    if "flash" in config._attn_implementation:
        return real.long()
    length = real.shape[1]
    mask = torch.zeros(real.shape[0], 1, length, length, dtype=dtype, device=real.device)
    return mask.masked_fill(~real[:, None, None, :], torch.finfo(dtype).min)
