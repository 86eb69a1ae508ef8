// SPDX-License-Identifier: Apache-2.0
// What select_dual and select_topk ask of their arguments; the fused operators share the last part.
#pragma once

#include "common/stable.h"

namespace mustdrop {

inline void check_selection(const char* op, const Tensor& token_types, const OptionalTensor& protect,  // [B, L]
                            const OptionalInt& capacity, int64_t drop_multiple, const Tensor& like) {
  if (protect) {
    check_shape(op, "protected", *protect, {token_types.size(0), token_types.size(1)});
    check_dtype(op, "protected", *protect, ScalarType::Bool);
    check_device(op, "protected", *protect, like);
    check_last_contiguous(op, "protected", *protect);
  }
  MUSTDROP_CHECK(!capacity || *capacity >= 0, op, "capacity", " must be at least 0, got ", capacity.value_or(0));
  MUSTDROP_CHECK(drop_multiple >= 1, op, "drop_multiple", " must be at least 1, got ", drop_multiple);
}

inline void check_budget(const char* op, const char* argument, int64_t k, const OptionalTensor& budgets,  // [B]
                         int64_t batch, const Tensor& like) {
  MUSTDROP_CHECK(k >= 0, op, argument, " must be at least 0, got ", k);
  if (!budgets) return;
  check_shape(op, "budgets", *budgets, {batch});
  check_dtype(op, "budgets", *budgets, ScalarType::Int);
  check_device(op, "budgets", *budgets, like);
}

inline void check_score_row(const char* op, const char* argument, const Tensor& scores) {  // [B, L]
  check_dim(op, argument, scores, 2, "(B, L)");
  check_float(op, argument, scores);
  check_last_contiguous(op, argument, scores);
}

inline void check_types_like(const char* op, const Tensor& token_types, const Tensor& scores) {  // both [B, L]
  check_shape(op, "token_types", token_types, {scores.size(0), scores.size(1)});
  check_dtype(op, "token_types", token_types, ScalarType::Byte);
  check_device(op, "token_types", token_types, scores);
  check_last_contiguous(op, "token_types", token_types);
}

inline void check_select_dual(const Tensor& total, const Tensor& peak, const Tensor& token_types,  // [B, L]
                              const OptionalTensor& protect, const OptionalInt& capacity, int64_t drop_multiple) {
  constexpr const char* op = "select_dual";
  check_score_row(op, "total", total);
  check_shape(op, "peak", peak, {total.size(0), total.size(1)});
  check_dtype(op, "peak", peak, total.scalar_type());
  check_device(op, "peak", peak, total);
  check_last_contiguous(op, "peak", peak);
  check_types_like(op, token_types, total);
  check_selection(op, token_types, protect, capacity, drop_multiple, total);
}

inline void check_select_topk(const Tensor& scores, const Tensor& token_types, int64_t k,  // [B, L]
                              const OptionalTensor& budgets, const OptionalTensor& protect, const OptionalInt& capacity,
                              int64_t drop_multiple) {
  constexpr const char* op = "select_topk";
  check_score_row(op, "scores", scores);
  check_types_like(op, token_types, scores);
  check_budget(op, "k", k, budgets, scores.size(0), scores);
  check_selection(op, token_types, protect, capacity, drop_multiple, scores);
}

}  // namespace mustdrop
