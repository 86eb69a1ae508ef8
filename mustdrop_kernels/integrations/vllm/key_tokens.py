# SPDX-License-Identifier: Apache-2.0
"""Importance of vision tokens: CLS attention of the tower's last layer, which vLLM itself does not load."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.clip import CLIPEncoderLayer

from ... import stages
from ...config import MustDropConfig


class KeyTokenLayer(CLIPEncoderLayer):
    """The tower's last layer, used for its queries and keys only; features pass through unchanged.

    As a layer of the tower its weights are loaded with the others.
    """

    def __init__(self, hf_config: Any, quant_config: Any, prefix: str, config: MustDropConfig) -> None:
        super().__init__(hf_config, quant_config, prefix=prefix, attn_cls=MMEncoderAttention)
        self._drop_config = config
        self._importance: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:  # (B, S, C), CLS first
        """Records the CLS attention of each tile, averaged over the ranks that share the heads."""
        attention, ranks = self.self_attn, get_tp_group()
        projected, _ = attention.qkv_proj(self.layer_norm1(hidden_states))
        query, key, _ = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected.chunk(3, dim=-1))
        group = ranks.device_group if ranks.world_size > 1 else None
        cls, scale = query[:, 0], attention.scale
        self._importance = stages.cls_attention(cls, key.transpose(1, 2), scale, self._drop_config, group=group)[:, 1:]
        return hidden_states

    def pop_importance(self) -> Tensor:
        """(B, S-1) float32 of the last run, without CLS."""
        importance, self._importance = self._importance, None
        assert importance is not None
        return importance
