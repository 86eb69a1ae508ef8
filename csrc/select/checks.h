// SPDX-License-Identifier: Apache-2.0
// Argument checks of select_dual, select_topk and their fusions with the scores.
#pragma once

#include "attention_scores/checks.h"
#include "common/checks.h"

namespace mustdrop {

inline void check_selection(const char* op, const Tensor& token_types,  // [B, L]
                            const OptionalTensor& protected_tokens,     // [B, L]
                            const OptionalInt& capacity, int64_t drop_multiple, const Tensor& like) {
  if (protected_tokens)
    check_tensor(op, "protected", *protected_tokens, {token_types.size(0), token_types.size(1)}, ScalarType::Bool,
                 like);
  if (capacity) check_at_least(op, "capacity", *capacity, 0);
  check_at_least(op, "drop_multiple", drop_multiple, 1);
}

// `argument`: the name of `budget` in the operator's schema.
inline void check_budget(const char* op, const char* argument, int64_t budget, const OptionalTensor& budgets,  // [B]
                         int64_t batch, const Tensor& like) {
  check_at_least(op, argument, budget, 0);
  if (budgets) check_tensor(op, "budgets", *budgets, {batch}, ScalarType::Int, like, true);
}

inline void check_select_dual(const Tensor& total,                     // [B, L]
                              const Tensor& peak,                      // [B, L]
                              const Tensor& token_types,               // [B, L]
                              const OptionalTensor& protected_tokens,  // [B, L]
                              const OptionalInt& capacity, int64_t drop_multiple) {
  constexpr const char* op = "select_dual";
  check_float_tensor(op, "total", total, {"B", "L"});
  check_tensor(op, "peak", peak, {total.size(0), total.size(1)}, total.scalar_type(), total);
  check_tensor(op, "token_types", token_types, {total.size(0), total.size(1)}, ScalarType::Byte, total);
  check_selection(op, token_types, protected_tokens, capacity, drop_multiple, total);
}

inline void check_select_topk(const Tensor& scores,       // [B, L]
                              const Tensor& token_types,  // [B, L]
                              int64_t k,
                              const OptionalTensor& budgets,           // [B]
                              const OptionalTensor& protected_tokens,  // [B, L]
                              const OptionalInt& capacity, int64_t drop_multiple) {
  constexpr const char* op = "select_topk";
  check_float_tensor(op, "scores", scores, {"B", "L"});
  check_tensor(op, "token_types", token_types, {scores.size(0), scores.size(1)}, ScalarType::Byte, scores);
  check_budget(op, "k", k, budgets, scores.size(0), scores);
  check_selection(op, token_types, protected_tokens, capacity, drop_multiple, scores);
}

inline void check_dual_attention_select(const Tensor& q,                         // [B, Hq, Lq, D]
                                        const Tensor& k,                         // [B, Hk, Lk, D]
                                        const Tensor& token_types,               // [B, Lk]
                                        const OptionalTensor& protected_tokens,  // [B, Lk]
                                        const OptionalTensor& lse,               // [B, Hq, Lq]
                                        const OptionalInt& capacity, int64_t drop_multiple) {
  constexpr const char* op = "dual_attention_select";
  check_text_vision_scores(op, q, k, token_types, lse);
  check_selection(op, token_types, protected_tokens, capacity, drop_multiple, q);
}

inline void check_topk_attention_select(const Tensor& q,            // [B, Hq, Lq, D]
                                        const Tensor& k,            // [B, Hk, Lk, D]
                                        const Tensor& token_types,  // [B, Lk]
                                        int64_t budget,
                                        const OptionalTensor& budgets,           // [B]
                                        const OptionalTensor& protected_tokens,  // [B, Lk]
                                        const OptionalTensor& lse,               // [B, Hq, Lq]
                                        const OptionalInt& capacity, int64_t drop_multiple) {
  constexpr const char* op = "topk_attention_select";
  check_text_vision_scores(op, q, k, token_types, lse);
  check_budget(op, "budget", budget, budgets, q.size(0), q);
  check_selection(op, token_types, protected_tokens, capacity, drop_multiple, q);
}

}  // namespace mustdrop
