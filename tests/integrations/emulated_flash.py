# SPDX-License-Identifier: Apache-2.0
"""An attention with the interface that transformers expects of flash attention, for machines without it.

Masks are (B, keys) or None, queries stand at the end of the keys, and positions with gaps in a batch of one mean
several packed sequences, which a prompt never is.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "emulated_flash"


def attention(module, query, key, value, attention_mask, scaling, is_causal=None, position_ids=None, **kwargs):
    batch, heads, rows, _ = query.shape
    length = key.shape[2]
    if attention_mask is None and position_ids is not None and batch == 1:
        assert (position_ids.diff() == 1).all(), "read as packed sequences"
    seen = torch.ones(rows, length, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(length - rows)
    seen = seen[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (batch, length)
        seen = seen & attention_mask.bool()[:, None, None]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.nan_to_num() @ value).transpose(1, 2), None  # a row that sees nothing is padding


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextlib.contextmanager
def on(model):
    """The model, tower and all, with this attention."""
    configs = (model.config.text_config, model.config.vision_config)
    names = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield model
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
