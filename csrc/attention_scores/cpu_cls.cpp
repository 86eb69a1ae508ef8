// SPDX-License-Identifier: Apache-2.0
// cls_attention on the CPU: checks, allocation, threads.
#include <algorithm>

#include "attention_scores/checks.h"
#include "attention_scores/cpu_kernel_cls.h"
#include "common/cpu_element.h"
#include "common/workers.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;      // least bytes of k that a thread reads
constexpr int64_t kWorkspaceFloats = 1 << 20;  // target size

Tensor cls_attention(const Tensor& q,  // [B, H, D]
                     const Tensor& k,  // [B, H, S, D]
                     double scale,
                     const OptionalTensor& counts,  // [B]
                     int64_t num_prefix_tokens) {
  check_cls_attention(q, k, counts, num_prefix_tokens);
  const int64_t batch = q.size(0), heads = q.size(1), span = k.size(2), dim = q.size(2);
  Tensor out = new_zeros(q, {batch, span}, ScalarType::Float);
  if (batch * heads * span == 0) return out;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t round = std::clamp<int64_t>(kWorkspaceFloats / (heads * span), 1, batch);  // sequences at a time
  Tensor workspace = new_empty(q, {round * heads * span + threads * dim}, ScalarType::Float);
  float* scratch = mutable_data<float>(workspace);

  cpu::ClsParameters p{};
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr();
  p.q_batch = q.stride(0), p.q_head = q.stride(1);
  p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_row = k.stride(2);
  p.heads = heads, p.span = span, p.dim = dim;
  p.prefix = num_prefix_tokens;
  p.counts = counts ? data<int32_t>(*counts) : nullptr;
  p.count_stride = counts ? counts->stride(0) : 0;
  p.scale = static_cast<float>(scale), p.element = element_of(q);
  p.probabilities = scratch + threads * dim;
  p.out = mutable_data<float>(out);

  const auto share = [&](void (*kernel)(const cpu::ClsTask&, int64_t, int64_t), int64_t items, int64_t cost) {
    const int64_t workers = std::min(worker_count(items, cost, kGrainBytes), threads);
    share_items(items, workers,
                [&](int64_t worker, int64_t begin, int64_t end) { kernel({&p, scratch + worker * dim}, begin, end); });
  };
  const int64_t element = q.element_size();
  for (p.first = 0; p.first < batch; p.first += round) {
    const int64_t sequences = std::min(round, batch - p.first);
    share(cpu::cls_softmax, sequences * heads, span * dim * element);
    share(cpu::cls_average, sequences, heads * span * element);
  }
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) { m.impl("cls_attention", TORCH_BOX(&mustdrop::cls_attention)); }
