// SPDX-License-Identifier: Apache-2.0
// What the operators that look at attention ask of their arguments.
#pragma once

#include "common/stable.h"

namespace mustdrop {

inline void check_query(const char* op, const Tensor& q, int64_t dim, const char* shape) {
  check_dim(op, "q", q, dim, shape);
  check_float(op, "q", q);
  check_last_contiguous(op, "q", q);
}

// k (or k_cache) beside q: shape is complete but for -1, which is anything.
inline void check_key(const char* op, const char* argument, const Tensor& q, const Tensor& k, std::vector<int64_t> shape,
                      const char* text, bool any_strides = false) {
  check_dim(op, argument, k, static_cast<int64_t>(shape.size()), text);
  for (size_t d = 0; d < shape.size(); ++d)
    if (shape[d] < 0) shape[d] = k.size(static_cast<int64_t>(d));
  check_shape(op, argument, k, shape);
  check_dtype(op, argument, k, q.scalar_type());
  check_device(op, argument, k, q);
  if (!any_strides) check_last_contiguous(op, argument, k);
}

inline void check_heads(const char* op, const char* argument, int64_t heads, int64_t key_heads) {
  MUSTDROP_CHECK(heads == 0 || (key_heads > 0 && heads % key_heads == 0), op, argument,
                 " must have a number of heads that divides the query's ", heads, ", got ", key_heads);
}

inline void check_int_vector(const char* op, const char* argument, const Tensor& t, int64_t size, const Tensor& like,
                             bool any_strides = false) {
  check_shape(op, argument, t, {size});
  check_dtype(op, argument, t, ScalarType::Int);
  check_device(op, argument, t, like);
  if (!any_strides) check_last_contiguous(op, argument, t);
}

inline void check_types(const char* op, const Tensor& token_types, std::vector<int64_t> shape, const Tensor& like) {
  check_shape(op, "token_types", token_types, std::move(shape));
  check_dtype(op, "token_types", token_types, ScalarType::Byte);
  check_device(op, "token_types", token_types, like);
  check_last_contiguous(op, "token_types", token_types);
}

inline void check_lse(const char* op, const OptionalTensor& lse, std::vector<int64_t> shape, const Tensor& like) {
  if (!lse) return;
  check_shape(op, "lse", *lse, std::move(shape));
  check_dtype(op, "lse", *lse, ScalarType::Float);
  check_device(op, "lse", *lse, like);
}

inline void check_cls_attention(const Tensor& q,               // [B, H, D]
                                const Tensor& k,               // [B, H, S, D]
                                const OptionalTensor& counts,  // [B]
                                int64_t num_prefix_tokens) {
  constexpr const char* op = "cls_attention";
  check_query(op, q, 3, "(B, H, D)");
  check_key(op, "k", q, k, {q.size(0), q.size(1), -1, q.size(2)}, "(B, H, S, D)");
  if (counts) check_int_vector(op, "counts", *counts, q.size(0), q, true);
  MUSTDROP_CHECK(num_prefix_tokens >= 0, op, "num_prefix_tokens", " must be at least 0, got ", num_prefix_tokens);
}

inline void check_dense_scores(const char* op, const Tensor& q, const Tensor& k,  // [B, Hq, Lq, D], [B, Hk, Lk, D]
                               const Tensor& token_types,                         // [B, Lk]
                               const OptionalTensor& lse) {                       // [B, Hq, Lq]
  check_query(op, q, 4, "(B, Hq, Lq, D)");
  check_key(op, "k", q, k, {q.size(0), -1, -1, q.size(3)}, "(B, Hk, Lk, D)");
  check_heads(op, "k", q.size(1), k.size(1));
  MUSTDROP_CHECK(q.size(2) <= k.size(2), op, "q", " must not have more rows than k, ", k.size(2), ", got ", q.size(2));
  check_types(op, token_types, {q.size(0), k.size(2)}, q);
  check_lse(op, lse, {q.size(0), q.size(1), q.size(2)}, q);
}

inline void check_packed_query(const char* op, const Tensor& q, const Tensor& cu_seqlens_q,  // [total_q, Hq, D], [B+1]
                               const OptionalTensor& lse) {                                  // [Hq, total_q]
  check_query(op, q, 3, "(total_q, Hq, D)");
  check_dim(op, "cu_seqlens_q", cu_seqlens_q, 1, "(B+1)");
  check_int_vector(op, "cu_seqlens_q", cu_seqlens_q, cu_seqlens_q.size(0), q);
  MUSTDROP_CHECK(cu_seqlens_q.size(0) >= 1, op, "cu_seqlens_q", " must have at least 1 entry, got ", shape_of(cu_seqlens_q));
  check_lse(op, lse, {q.size(1), q.size(0)}, q);
}

inline void check_longest(const char* op, const char* argument, int64_t value) {
  MUSTDROP_CHECK(value >= 0, op, argument, " must be at least 0, got ", value);
}

inline void check_varlen_scores(const Tensor& q, const Tensor& k,  // [total_q, Hq, D], [total_k, Hk, D]
                                const Tensor& token_types,         // [total_k]
                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,  // [B+1]
                                int64_t max_seqlen_q, int64_t max_seqlen_k,
                                const OptionalTensor& lse) {  // [Hq, total_q]
  constexpr const char* op = "text_vision_scores_varlen";
  check_packed_query(op, q, cu_seqlens_q, lse);
  check_key(op, "k", q, k, {-1, -1, q.size(2)}, "(total_k, Hk, D)");
  check_heads(op, "k", q.size(1), k.size(1));
  check_types(op, token_types, {k.size(0)}, q);
  check_int_vector(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.size(0), q);
  check_longest(op, "max_seqlen_q", max_seqlen_q);
  check_longest(op, "max_seqlen_k", max_seqlen_k);
}

inline void check_paged_scores(const Tensor& q, const Tensor& k_cache,  // [total_q, Hq, D], [blocks, slots, Hk, D]
                               const Tensor& block_table, const Tensor& seq_lens,  // [B, max_blocks], [B]
                               const Tensor& token_types,                          // [B, max_len]
                               const Tensor& cu_seqlens_q, int64_t max_seqlen_q,
                               const OptionalTensor& lse) {  // [Hq, total_q]
  constexpr const char* op = "text_vision_scores_paged";
  check_packed_query(op, q, cu_seqlens_q, lse);
  check_key(op, "k_cache", q, k_cache, {-1, -1, -1, q.size(2)}, "(blocks, slots, Hk, D)", true);
  MUSTDROP_CHECK(k_cache.size(1) >= 1, op, "k_cache", " must have at least 1 slot a block, got ", shape_of(k_cache));
  check_heads(op, "k_cache", q.size(1), k_cache.size(2));
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  check_dim(op, "block_table", block_table, 2, "(B, max_blocks)");
  check_shape(op, "block_table", block_table, {batch, block_table.size(1)});
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_device(op, "block_table", block_table, q);
  check_last_contiguous(op, "block_table", block_table);
  check_int_vector(op, "seq_lens", seq_lens, batch, q);
  check_dim(op, "token_types", token_types, 2, "(B, max_len)");
  check_types(op, token_types, {batch, token_types.size(1)}, q);
  check_longest(op, "max_seqlen_q", max_seqlen_q);
}

}  // namespace mustdrop
