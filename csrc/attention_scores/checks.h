// SPDX-License-Identifier: Apache-2.0
// Argument checks of the scoring operators.
#pragma once

#include "common/checks.h"

namespace mustdrop {

inline void check_heads(const char* op, const char* argument, int64_t heads, int64_t kv_heads) {
  if (heads != 0 && (kv_heads <= 0 || heads % kv_heads != 0))
    refuse_argument(op, argument, "must have a number of heads that divides the query's ", heads, ", got ", kv_heads);
}

inline void check_packed_query(const char* op,
                               const Tensor& q,              // [total_q, Hq, D]
                               const Tensor& cu_seqlens_q,   // [B+1]
                               const OptionalTensor& lse) {  // [Hq, total_q]
  check_float_tensor(op, "q", q, {"total_q", "Hq", "D"});
  check_tensor(op, "cu_seqlens_q", cu_seqlens_q, {"B+1"}, ScalarType::Int, q);
  check_at_least(op, "cu_seqlens_q", cu_seqlens_q.size(0), 1);
  if (lse) check_tensor(op, "lse", *lse, {q.size(1), q.size(0)}, ScalarType::Float, q, true);
}

// `op`: the operator that messages name. Fused operators check these arguments first.
inline void check_text_vision_scores(const char* op,
                                     const Tensor& q,              // [B, Hq, Lq, D]
                                     const Tensor& k,              // [B, Hk, Lk, D]
                                     const Tensor& token_types,    // [B, Lk]
                                     const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_float_tensor(op, "q", q, {"B", "Hq", "Lq", "D"});
  check_tensor(op, "k", k, {q.size(0), "Hk", "Lk", q.size(3)}, q.scalar_type(), q);
  check_heads(op, "k", q.size(1), k.size(1));
  if (q.size(2) > k.size(2))
    refuse_argument(op, "q", "must not have more rows than k, ", k.size(2), ", got ", q.size(2));
  check_tensor(op, "token_types", token_types, {q.size(0), k.size(2)}, ScalarType::Byte, q);
  if (lse) check_tensor(op, "lse", *lse, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q, true);
}

inline void check_text_vision_attention(const Tensor& q,            // [B, Hq, Lq, D]
                                        const Tensor& k,            // [B, Hk, Lk, D]
                                        const Tensor& token_types,  // [B, Lk]
                                        int64_t max_query,
                                        const OptionalTensor& lse) {  // [B, Hq, Lq]
  constexpr const char* op = "text_vision_attention";
  check_text_vision_scores(op, q, k, token_types, lse);
  check_at_least(op, "max_query", max_query, 0);
}

inline void check_text_vision_scores_varlen(const Tensor& q,             // [total_q, Hq, D]
                                            const Tensor& k,             // [total_k, Hk, D]
                                            const Tensor& token_types,   // [total_k]
                                            const Tensor& cu_seqlens_q,  // [B+1]
                                            const Tensor& cu_seqlens_k,  // [B+1]
                                            int64_t max_seqlen_q, int64_t max_seqlen_k,
                                            const OptionalTensor& lse) {  // [Hq, total_q]
  constexpr const char* op = "text_vision_scores_varlen";
  check_packed_query(op, q, cu_seqlens_q, lse);
  check_tensor(op, "k", k, {"total_k", "Hk", q.size(2)}, q.scalar_type(), q);
  check_heads(op, "k", q.size(1), k.size(1));
  check_tensor(op, "token_types", token_types, {k.size(0)}, ScalarType::Byte, q);
  check_tensor(op, "cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)}, ScalarType::Int, q);
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
  check_at_least(op, "max_seqlen_k", max_seqlen_k, 0);
}

inline void check_text_vision_scores_paged(const Tensor& q,             // [total_q, Hq, D]
                                           const Tensor& k_cache,       // [blocks, page_size, Hk, D]
                                           const Tensor& block_table,   // [B, max_blocks]
                                           const Tensor& seq_lens,      // [B]
                                           const Tensor& token_types,   // [B, max_len]
                                           const Tensor& cu_seqlens_q,  // [B+1]
                                           int64_t max_seqlen_q,
                                           const OptionalTensor& lse) {  // [Hq, total_q]
  constexpr const char* op = "text_vision_scores_paged";
  check_packed_query(op, q, cu_seqlens_q, lse);
  check_tensor(op, "k_cache", k_cache, {"blocks", "page_size", "Hk", q.size(2)}, q.scalar_type(), q, true);
  check_at_least(op, "k_cache", k_cache.size(1), 1);
  check_heads(op, "k_cache", q.size(1), k_cache.size(2));
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  check_tensor(op, "block_table", block_table, {batch, "max_blocks"}, ScalarType::Int, q);
  check_tensor(op, "seq_lens", seq_lens, {batch}, ScalarType::Int, q);
  check_tensor(op, "token_types", token_types, {batch, "max_len"}, ScalarType::Byte, q);
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
}

inline void check_cls_attention(const Tensor& q,               // [B, H, D]
                                const Tensor& k,               // [B, H, S, D]
                                const OptionalTensor& counts,  // [B]
                                int64_t num_prefix_tokens) {
  constexpr const char* op = "cls_attention";
  check_float_tensor(op, "q", q, {"B", "H", "D"});
  check_tensor(op, "k", k, {q.size(0), q.size(1), "S", q.size(2)}, q.scalar_type(), q);
  if (counts) check_tensor(op, "counts", *counts, {q.size(0)}, ScalarType::Int, q, true);
  check_at_least(op, "num_prefix_tokens", num_prefix_tokens, 0);
}

}  // namespace mustdrop
