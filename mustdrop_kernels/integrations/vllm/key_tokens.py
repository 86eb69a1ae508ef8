# SPDX-License-Identifier: Apache-2.0
"""Key tokens: the attention of CLS in the vision tower's last layer, which vLLM otherwise leaves out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.clip import CLIPEncoderLayer

from ... import stages
from ...config import MustDropConfig


class KeyLayer(CLIPEncoderLayer):
    """The tower's last layer, of which only queries and keys are used; the features go through it unchanged.

    It stands in the tower as the layer that it is, so its weights are loaded with the others.
    """

    def __init__(self, hf_config: Any, quant_config: Any, prefix: str, config: MustDropConfig) -> None:
        super().__init__(hf_config, quant_config, prefix=prefix, attn_cls=MMEncoderAttention)
        self._drop_config = config
        self._found: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:  # (B, S, C), CLS first
        """Finds what CLS looks at in each tile. With tensor parallelism each rank has some of the heads."""
        attention, ranks = self.self_attn, get_tp_group()
        projected, _ = attention.qkv_proj(self.layer_norm1(hidden_states))
        query, key, _ = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected.chunk(3, dim=-1))
        group = ranks.device_group if ranks.world_size > 1 else None
        found = stages.cls_attention(query[:, 0], key.transpose(1, 2), attention.scale, self._drop_config, group=group)
        self._found = found[:, 1:]
        return hidden_states

    def take(self) -> Tensor:
        """(B, S-1) float32 of the last run, CLS left out."""
        found, self._found = self._found, None
        assert found is not None
        return found
