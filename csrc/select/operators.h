// SPDX-License-Identifier: Apache-2.0
// select_dual, select_topk and their fusions with the scores, over the kernels of any device.
#pragma once

#include "select/checks.h"

namespace mustdrop {

struct Selected {
  Tensor keep, counts;  // [B, capacity], [B]
};

// Inputs that both rules share.
struct SelectInputs {
  const Tensor& scores;                    // [B, L]; total in the dual rule
  const Tensor& token_types;               // [B, L]
  const OptionalTensor& protected_tokens;  // [B, L]
  int64_t capacity;                        // columns of keep
  int64_t drop_multiple;

  SelectInputs(const Tensor& scores, const Tensor& token_types, const OptionalTensor& protected_tokens,
               const OptionalInt& capacity, int64_t drop_multiple)
      : scores(scores),
        token_types(token_types),
        protected_tokens(protected_tokens),
        capacity(capacity.value_or(scores.size(1))),
        drop_multiple(drop_multiple) {}
};

// Kernels(like) runs on the device of `like`. It has three functions, whose arguments are checked; a selection may follow
// the scores:
//   Scores text_vision_scores(q, k, token_types, scale, lse)
//   Selected select_dual(inputs, peak, global_threshold, individual_threshold)
//   Selected select_topk(inputs, k, budgets)
template <class Kernels>
struct SelectOperators {
  static std::tuple<Tensor, Tensor> select_dual(const Tensor& total,        // [B, L]
                                                const Tensor& peak,         // [B, L]
                                                const Tensor& token_types,  // [B, L]
                                                double global_threshold, double individual_threshold,
                                                const OptionalTensor& protected_tokens,  // [B, L]
                                                OptionalInt capacity, int64_t drop_multiple) {
    check_select_dual(total, peak, token_types, protected_tokens, capacity, drop_multiple);
    const SelectInputs inputs(total, token_types, protected_tokens, capacity, drop_multiple);
    const auto [keep, counts] = Kernels(total).select_dual(inputs, peak, global_threshold, individual_threshold);
    return {keep, counts};
  }

  static std::tuple<Tensor, Tensor> select_topk(const Tensor& scores,       // [B, L]
                                                const Tensor& token_types,  // [B, L]
                                                int64_t k,
                                                const OptionalTensor& budgets,           // [B]
                                                const OptionalTensor& protected_tokens,  // [B, L]
                                                OptionalInt capacity, int64_t drop_multiple) {
    check_select_topk(scores, token_types, k, budgets, protected_tokens, capacity, drop_multiple);
    const SelectInputs inputs(scores, token_types, protected_tokens, capacity, drop_multiple);
    const auto [keep, counts] = Kernels(scores).select_topk(inputs, k, budgets);
    return {keep, counts};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> dual_attention_select(
      const Tensor& q,            // [B, Hq, Lq, D]
      const Tensor& k,            // [B, Hk, Lk, D]
      const Tensor& token_types,  // [B, Lk]
      double scale, double global_threshold, double individual_threshold,
      const OptionalTensor& protected_tokens,  // [B, Lk]
      const OptionalTensor& lse,               // [B, Hq, Lq]
      OptionalInt capacity, int64_t drop_multiple) {
    check_dual_attention_select(q, k, token_types, protected_tokens, lse, capacity, drop_multiple);
    Kernels kernels(q);
    const auto [total, peak] = kernels.text_vision_scores(q, k, token_types, scale, lse);
    const SelectInputs inputs(total, token_types, protected_tokens, capacity, drop_multiple);
    const auto [keep, counts] = kernels.select_dual(inputs, peak, global_threshold, individual_threshold);
    return {keep, counts, total, peak};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> topk_attention_select(
      const Tensor& q,            // [B, Hq, Lq, D]
      const Tensor& k,            // [B, Hk, Lk, D]
      const Tensor& token_types,  // [B, Lk]
      double scale, int64_t budget,
      const OptionalTensor& budgets,           // [B]
      const OptionalTensor& protected_tokens,  // [B, Lk]
      const OptionalTensor& lse,               // [B, Hq, Lq]
      OptionalInt capacity, int64_t drop_multiple) {
    check_topk_attention_select(q, k, token_types, budget, budgets, protected_tokens, lse, capacity, drop_multiple);
    Kernels kernels(q);
    const auto [total, peak] = kernels.text_vision_scores(q, k, token_types, scale, lse);
    const SelectInputs inputs(total, token_types, protected_tokens, capacity, drop_multiple);
    const auto [keep, counts] = kernels.select_topk(inputs, budget, budgets);
    return {keep, counts, total, peak};
  }
};

}  // namespace mustdrop
