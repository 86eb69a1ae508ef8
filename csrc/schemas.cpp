// SPDX-License-Identifier: Apache-2.0
// Schemas of all operators: a public contract. A change may only add an operator, or a keyword with a default
// (tests/ops/test_schemas.py).
#include "common/stable.h"

STABLE_TORCH_LIBRARY(MUSTDROP_NAMESPACE, m) {
  // Stage 1, vision encoding
  m.def(
      "spatial_merge(Tensor x, SymInt[] grid, int[] window, float threshold=0.8, *, SymInt? budget=None, "
      "bool uniform=False, int num_prefix_tokens=1, Tensor? sizes=None, bool merged_first=False) "
      "-> (Tensor tokens, Tensor counts, Tensor assignment, Tensor sizes)");
  m.def(
      "cls_attention(Tensor q, Tensor k, float scale, *, Tensor? counts=None, int num_prefix_tokens=1) "
      "-> Tensor");

  // Stage 2, prefill
  m.def(
      "text_vision_scores(Tensor q, Tensor k, Tensor token_types, float scale, *, Tensor? lse=None) "
      "-> (Tensor total, Tensor peak)");
  m.def(
      "text_vision_scores_varlen(Tensor q, Tensor k, Tensor token_types, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, *, Tensor? lse=None) "
      "-> (Tensor total, Tensor peak)");
  m.def(
      "text_vision_scores_paged(Tensor q, Tensor k_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor token_types, Tensor cu_seqlens_q, SymInt max_seqlen_q, float scale, *, Tensor? lse=None) "
      "-> (Tensor total, Tensor peak)");
  m.def(
      "text_vision_attention(Tensor q, Tensor k, Tensor token_types, float scale, SymInt max_query, *, "
      "Tensor? lse=None) -> Tensor");
  m.def(
      "select_dual(Tensor total, Tensor peak, Tensor token_types, float global_threshold, "
      "float individual_threshold, *, Tensor? protected=None, SymInt? capacity=None, SymInt drop_multiple=1) "
      "-> (Tensor keep, Tensor counts)");
  m.def(
      "select_topk(Tensor scores, Tensor token_types, SymInt k, *, Tensor? budgets=None, "
      "Tensor? protected=None, SymInt? capacity=None, SymInt drop_multiple=1) "
      "-> (Tensor keep, Tensor counts)");
  m.def(
      "dual_attention_select(Tensor q, Tensor k, Tensor token_types, float scale, float global_threshold, "
      "float individual_threshold, *, Tensor? protected=None, Tensor? lse=None, SymInt? capacity=None, "
      "SymInt drop_multiple=1) -> (Tensor keep, Tensor counts, Tensor total, Tensor peak)");
  m.def(
      "topk_attention_select(Tensor q, Tensor k, Tensor token_types, float scale, SymInt budget, *, "
      "Tensor? budgets=None, Tensor? protected=None, Tensor? lse=None, SymInt? capacity=None, "
      "SymInt drop_multiple=1) -> (Tensor keep, Tensor counts, Tensor total, Tensor peak)");
  m.def("gather_tokens(Tensor x, Tensor keep, Tensor counts, *, bool align_end=False) -> Tensor");

  // Stage 3, decoding
  m.def(
      "compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] keep, Tensor[] counts, *, "
      "bool align_end=False) -> ()");
  m.def(
      "compact_paged_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor block_table, Tensor[] keep, "
      "Tensor[] counts, *, Tensor? seq_lens=None, bool align_end=False) -> ()");
}
