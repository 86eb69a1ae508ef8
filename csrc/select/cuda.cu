// SPDX-License-Identifier: Apache-2.0
// select_dual, select_topk and their fusions with the scores on CUDA.
#include "attention_scores/checks.h"
#include "attention_scores/cuda.h"
#include "select/checks.h"
#include "select/launch.h"

namespace mustdrop {
namespace {

using Selection2 = std::tuple<Tensor, Tensor>;                       // keep [B, L or capacity], counts [B]
using ScoredSelection = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // and total and peak, [B, L]

Selection2 select_dual(const Tensor& total,        // [B, L]
                       const Tensor& peak,         // [B, L]
                       const Tensor& token_types,  // [B, L]
                       double global_threshold, double individual_threshold,
                       const OptionalTensor& protect,  // [B, L]
                       OptionalInt capacity, int64_t drop_multiple) {
  check_select_dual(total, peak, token_types, protect, capacity, drop_multiple);
  const Device device(total);
  const Selection selection{total, token_types, protect, capacity, drop_multiple};
  Selected result = launch_select_dual(device, selection, peak, global_threshold, individual_threshold);
  return {result.keep, result.counts};
}

Selection2 select_topk(const Tensor& scores,       // [B, L]
                       const Tensor& token_types,  // [B, L]
                       int64_t k,
                       const OptionalTensor& budgets,  // [B]
                       const OptionalTensor& protect,  // [B, L]
                       OptionalInt capacity, int64_t drop_multiple) {
  check_select_topk(scores, token_types, k, budgets, protect, capacity, drop_multiple);
  const Device device(scores);
  const Selection selection{scores, token_types, protect, capacity, drop_multiple};
  Selected result = launch_select_topk(device, selection, k, budgets);
  return {result.keep, result.counts};
}

ScoredSelection dual_attention_select(const Tensor& q,            // [B, Hq, Lq, D]
                                      const Tensor& k,            // [B, Hk, Lk, D]
                                      const Tensor& token_types,  // [B, Lk]
                                      double scale, double global_threshold, double individual_threshold,
                                      const OptionalTensor& protect,  // [B, Lk]
                                      const OptionalTensor& lse,      // [B, Hq, Lq]
                                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "dual_attention_select";
  check_text_vision_scores(op, q, k, token_types, lse);
  check_selection(op, token_types, protect, capacity, drop_multiple, q);
  const Device device(q);
  const auto [total, peak] = launch_text_vision_scores(device, q, k, token_types, scale, lse);
  const Selection selection{total, token_types, protect, capacity, drop_multiple};
  const auto [keep, counts] = launch_select_dual(device, selection, peak, global_threshold, individual_threshold);
  return {keep, counts, total, peak};
}

ScoredSelection topk_attention_select(const Tensor& q,            // [B, Hq, Lq, D]
                                      const Tensor& k,            // [B, Hk, Lk, D]
                                      const Tensor& token_types,  // [B, Lk]
                                      double scale, int64_t budget,
                                      const OptionalTensor& budgets,  // [B]
                                      const OptionalTensor& protect,  // [B, Lk]
                                      const OptionalTensor& lse,      // [B, Hq, Lq]
                                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "topk_attention_select";
  check_text_vision_scores(op, q, k, token_types, lse);
  check_budget(op, "budget", budget, budgets, q.size(0), q);
  check_selection(op, token_types, protect, capacity, drop_multiple, q);
  const Device device(q);
  const auto [total, peak] = launch_text_vision_scores(device, q, k, token_types, scale, lse);
  const Selection selection{total, token_types, protect, capacity, drop_multiple};
  const auto [keep, counts] = launch_select_topk(device, selection, budget, budgets);
  return {keep, counts, total, peak};
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("select_dual", TORCH_BOX(&mustdrop::select_dual));
  m.impl("select_topk", TORCH_BOX(&mustdrop::select_topk));
  m.impl("dual_attention_select", TORCH_BOX(&mustdrop::dual_attention_select));
  m.impl("topk_attention_select", TORCH_BOX(&mustdrop::topk_attention_select));
}
