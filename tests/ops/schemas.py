# SPDX-License-Identifier: Apache-2.0
"""The public contract: every op's schema, held literally. A change may add a keyword with a default, or an op."""

from __future__ import annotations

SCHEMAS = {
    "spatial_merge": (
        "mustdrop::spatial_merge(Tensor x, SymInt[] grid, int[] window, float threshold=0.8, *,"
        " SymInt? budget=None, bool uniform=False, int num_prefix_tokens=1, Tensor? sizes=None,"
        " bool merged_first=False) -> (Tensor tokens, Tensor counts, Tensor assignment, Tensor sizes)"
    ),
    "cls_attention": (
        "mustdrop::cls_attention(Tensor q, Tensor k, float scale, *, Tensor? counts=None,"
        " int num_prefix_tokens=1) -> Tensor"
    ),
    "text_vision_scores": (
        "mustdrop::text_vision_scores(Tensor q, Tensor k, Tensor token_types, float scale, *,"
        " Tensor? lse=None) -> (Tensor total, Tensor peak)"
    ),
    "text_vision_scores_varlen": (
        "mustdrop::text_vision_scores_varlen(Tensor q, Tensor k, Tensor token_types, Tensor cu_seqlens_q,"
        " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, *,"
        " Tensor? lse=None) -> (Tensor total, Tensor peak)"
    ),
    "text_vision_scores_paged": (
        "mustdrop::text_vision_scores_paged(Tensor q, Tensor k_cache, Tensor block_table, Tensor seq_lens,"
        " Tensor token_types, Tensor cu_seqlens_q, SymInt max_seqlen_q, float scale, *,"
        " Tensor? lse=None) -> (Tensor total, Tensor peak)"
    ),
    "text_vision_attention": (
        "mustdrop::text_vision_attention(Tensor q, Tensor k, Tensor token_types, float scale, SymInt max_query, *,"
        " Tensor? lse=None) -> Tensor"
    ),
    "select_dual": (
        "mustdrop::select_dual(Tensor total, Tensor peak, Tensor token_types, float global_threshold,"
        " float individual_threshold, *, Tensor? protected=None, SymInt? capacity=None,"
        " SymInt drop_multiple=1) -> (Tensor keep, Tensor counts)"
    ),
    "select_topk": (
        "mustdrop::select_topk(Tensor scores, Tensor token_types, SymInt k, *, Tensor? budgets=None,"
        " Tensor? protected=None, SymInt? capacity=None, SymInt drop_multiple=1) -> (Tensor keep, Tensor counts)"
    ),
    "dual_attention_select": (
        "mustdrop::dual_attention_select(Tensor q, Tensor k, Tensor token_types, float scale,"
        " float global_threshold, float individual_threshold, *, Tensor? protected=None, Tensor? lse=None,"
        " SymInt? capacity=None, SymInt drop_multiple=1)"
        " -> (Tensor keep, Tensor counts, Tensor total, Tensor peak)"
    ),
    "topk_attention_select": (
        "mustdrop::topk_attention_select(Tensor q, Tensor k, Tensor token_types, float scale, SymInt budget, *,"
        " Tensor? budgets=None, Tensor? protected=None, Tensor? lse=None, SymInt? capacity=None,"
        " SymInt drop_multiple=1) -> (Tensor keep, Tensor counts, Tensor total, Tensor peak)"
    ),
    "gather_tokens": "mustdrop::gather_tokens(Tensor x, Tensor keep, Tensor counts, *, bool align_end=False) -> Tensor",
    "compact_kv_": (
        "mustdrop::compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] keep, Tensor[] counts, *,"
        " bool align_end=False) -> ()"
    ),
    "compact_paged_kv_": (
        "mustdrop::compact_paged_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor block_table, Tensor[] keep,"
        " Tensor[] counts, *, Tensor? seq_lens=None, bool align_end=False) -> ()"
    ),
}

OPS = tuple(SCHEMAS)
