# SPDX-License-Identifier: Apache-2.0
"""Every operator in plain PyTorch: slow, and meant to be read beside the formulas of the documentation."""

from .compact import compact_kv_, compact_paged_kv_
from .gather import gather_tokens
from .merge import spatial_merge
from .scores import (
    cls_attention,
    text_vision_attention,
    text_vision_scores,
    text_vision_scores_paged,
    text_vision_scores_varlen,
)
from .select import dual_attention_select, select_dual, select_topk, topk_attention_select

__all__ = [
    "cls_attention",
    "compact_kv_",
    "compact_paged_kv_",
    "dual_attention_select",
    "gather_tokens",
    "select_dual",
    "select_topk",
    "spatial_merge",
    "text_vision_attention",
    "text_vision_scores",
    "text_vision_scores_paged",
    "text_vision_scores_varlen",
    "topk_attention_select",
]
