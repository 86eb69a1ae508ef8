// SPDX-License-Identifier: Apache-2.0
// Plans and launches the selection kernel; the fused operators launch it too.
#pragma once

#include "common/launch.h"
#include "select/kernel.cuh"

namespace mustdrop {

struct Selected {
  Tensor keep, counts;  // [B, capacity], [B]
};

// What both rules share. `scores` is the ranking: total, or the scores of top-k.
struct Selection {
  const Tensor& scores;           // [B, L]
  const Tensor& token_types;      // [B, L]
  const OptionalTensor& protect;  // [B, L]
  OptionalInt capacity;
  int64_t drop_multiple;
};

inline SelectParameters describe(const Selection& s, int64_t capacity) {
  SelectParameters p{};
  p.scores = s.scores.const_data_ptr();
  p.token_types = data<uint8_t>(s.token_types);
  p.protect = s.protect ? data<bool>(*s.protect) : nullptr;
  p.length = s.scores.size(1);
  p.capacity = capacity;
  p.drop_multiple = s.drop_multiple;
  p.score_stride = s.scores.stride(0);
  p.type_stride = s.token_types.stride(0);
  p.protect_stride = s.protect ? s.protect->stride(0) : 0;
  return p;
}

// One block to this many tokens of a sequence, a cluster above.
constexpr int64_t kSelectAlone = 20480;

inline Selected launch_select(const Device& device, const Selection& s, SelectParameters p) {
  const int64_t batch = s.scores.size(0);
  Selected result{new_empty(s.scores, {batch, p.capacity}, ScalarType::Long),
                  new_empty(s.scores, {batch}, ScalarType::Int)};
  if (batch == 0) return result;
  p.keep = mutable_data<int64_t>(result.keep);
  p.counts = mutable_data<int32_t>(result.counts);
  const DeviceFacts facts = device.facts();
  Grid grid{dim3(), 256};
  if (has_clusters(facts) && p.length > kSelectAlone)
    while (grid.cluster < 8 && p.length > kSelectAlone / 2 * grid.cluster) grid.cluster *= 2;
  grid.blocks.x = blocks(batch * grid.cluster);
  p.part = ceil_div(ceil_div(p.length, grid.cluster), kSelectItems) * kSelectItems;
  while (grid.threads < 1024 && int64_t(grid.threads) * kSelectItems < p.part) grid.threads *= 2;
  const int64_t bytes = static_cast<int64_t>(sizeof(SelectShared)) + p.part * 4;
  p.cached = bytes <= facts.shared_bytes;
  grid.shared_bytes = p.cached ? bytes : sizeof(SelectShared);
  with_float_type(s.scores.scalar_type(), [&](auto* type) {
    device.launch(grid, MUSTDROP_KERNEL(select_kernel<std::remove_pointer_t<decltype(type)>>), p);
  });
  return result;
}

inline Selected launch_select_dual(const Device& device, const Selection& s, const Tensor& peak,
                                   double global_threshold, double individual_threshold) {
  SelectParameters p = describe(s, s.capacity.value_or(s.scores.size(1)));
  p.peak = peak.const_data_ptr();
  p.peak_stride = peak.stride(0);
  p.global_threshold = static_cast<float>(global_threshold);
  p.individual_threshold = static_cast<float>(individual_threshold);
  return launch_select(device, s, p);
}

inline Selected launch_select_topk(const Device& device, const Selection& s, int64_t k, const OptionalTensor& budgets) {
  SelectParameters p = describe(s, s.capacity.value_or(s.scores.size(1)));
  p.k = k;
  p.budgets = budgets ? data<int32_t>(*budgets) : nullptr;
  p.budget_stride = budgets ? budgets->stride(0) : 0;
  return launch_select(device, s, p);
}

}  // namespace mustdrop
