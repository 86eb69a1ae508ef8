// SPDX-License-Identifier: Apache-2.0
// The operators of operators.h on CUDA: plans and launches the selection kernel.
#include "attention_scores/cuda.h"
#include "common/launch.h"
#include "select/kernel.cuh"
#include "select/operators.h"

namespace mustdrop {
namespace {

constexpr int64_t kSelectAlone = 20480;  // tokens of a sequence that one block selects from; a cluster above

// Sets the fields that both rules share, launches the kernel, returns its results. `overlaps`: see Grid.
Selected launch_select(const Device& device, bool overlaps, SelectParameters p, const SelectInputs& inputs) {
  const int64_t batch = inputs.scores.size(0);
  Selected result{new_empty(inputs.scores, {batch, inputs.capacity}, ScalarType::Long),
                  new_empty(inputs.scores, {batch}, ScalarType::Int)};
  if (batch == 0) return result;
  p.scores = inputs.scores.const_data_ptr();
  p.token_types = data<uint8_t>(inputs.token_types);
  p.length = inputs.scores.size(1);
  p.capacity = inputs.capacity;
  p.drop_multiple = inputs.drop_multiple;
  p.score_stride = inputs.scores.stride(0);
  p.type_stride = inputs.token_types.stride(0);
  if (inputs.protected_tokens) {
    p.protected_tokens = data<bool>(*inputs.protected_tokens);
    p.protected_stride = inputs.protected_tokens->stride(0);
  }
  p.keep = mutable_data<int64_t>(result.keep);
  p.counts = mutable_data<int32_t>(result.counts);
  const DeviceFacts facts = device.facts();
  Grid grid{dim3(), 256};
  if (has_clusters(facts) && p.length > kSelectAlone)
    while (grid.cluster < 8 && p.length > kSelectAlone / 2 * grid.cluster) grid.cluster *= 2;
  grid.blocks.x = blocks(batch * grid.cluster);
  grid.overlaps = overlaps;
  p.part = ceil_div(ceil_div(p.length, grid.cluster), kSelectItems) * kSelectItems;
  while (grid.threads < 1024 && int64_t(grid.threads) * kSelectItems < p.part) grid.threads *= 2;
  const int64_t bytes = static_cast<int64_t>(sizeof(SelectShared)) + p.part * 4;
  p.cached = bytes <= facts.shared_bytes;
  grid.shared_bytes = p.cached ? bytes : sizeof(SelectShared);
  with_float_type(inputs.scores.scalar_type(), [&](auto* type) {
    device.launch(grid, MUSTDROP_KERNEL(select_kernel<std::remove_pointer_t<decltype(type)>>), p);
  });
  return result;
}

struct CudaKernels {
  explicit CudaKernels(const Tensor& like) : device(like) {}

  Scores text_vision_scores(const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                            const OptionalTensor& lse) {
    follows_scores = true;
    return launch_text_vision_scores(device, q, k, token_types, scale, lse);
  }

  Selected select_dual(const SelectInputs& inputs, const Tensor& peak, double global_threshold,
                       double individual_threshold) const {
    SelectParameters p{};
    p.peak = peak.const_data_ptr();
    p.peak_stride = peak.stride(0);
    p.global_threshold = static_cast<float>(global_threshold);
    p.individual_threshold = static_cast<float>(individual_threshold);
    return launch_select(device, follows_scores, p, inputs);
  }

  Selected select_topk(const SelectInputs& inputs, int64_t k, const OptionalTensor& budgets) const {
    SelectParameters p{};
    p.k = k;
    if (budgets) {
      p.budgets = data<int32_t>(*budgets);
      p.budget_stride = budgets->stride(0);
    }
    return launch_select(device, follows_scores, p, inputs);
  }

  Device device;
  bool follows_scores = false;  // the kernel launched before is that of the scores
};

using Operators = SelectOperators<CudaKernels>;

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("select_dual", TORCH_BOX(&mustdrop::Operators::select_dual));
  m.impl("select_topk", TORCH_BOX(&mustdrop::Operators::select_topk));
  m.impl("dual_attention_select", TORCH_BOX(&mustdrop::Operators::dual_attention_select));
  m.impl("topk_attention_select", TORCH_BOX(&mustdrop::Operators::topk_attention_select));
}
