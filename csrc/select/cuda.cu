// SPDX-License-Identifier: Apache-2.0
// select_dual and select_topk on CUDA.
#include "select/checks.h"
#include "select/launch.h"

namespace mustdrop {
namespace {

using Selection2 = std::tuple<Tensor, Tensor>;

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

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(mustdrop, CUDA, m) {
  m.impl("select_dual", TORCH_BOX(&mustdrop::select_dual));
  m.impl("select_topk", TORCH_BOX(&mustdrop::select_topk));
}
