// SPDX-License-Identifier: Apache-2.0
// The operators of operators.h on the CPU: the threads share the sequences.
#include "attention_scores/cpu.h"

#include <memory>

#include "common/cpu_element.h"
#include "common/workers.h"
#include "select/cpu_kernel.h"
#include "select/operators.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainTokens = 4096;  // least work of a thread

// Sets the fields that both rules share, runs the kernel, returns its results.
Selected run(cpu::SelectParameters p, const SelectInputs& inputs) {
  const int64_t batch = inputs.scores.size(0), length = inputs.scores.size(1);
  Selected result{new_empty(inputs.scores, {batch, inputs.capacity}, ScalarType::Long),
                  new_empty(inputs.scores, {batch}, ScalarType::Int)};
  p.element = element_of(inputs.scores);
  p.scores = inputs.scores.const_data_ptr();
  p.score_stride = inputs.scores.stride(0);
  p.token_types = data<uint8_t>(inputs.token_types);
  p.type_stride = inputs.token_types.stride(0);
  if (inputs.protected_tokens) {
    p.protected_tokens = data<uint8_t>(*inputs.protected_tokens);
    p.protected_stride = inputs.protected_tokens->stride(0);
  }
  p.length = length;
  p.drop_multiple = inputs.drop_multiple;
  p.keep = mutable_data<int64_t>(result.keep);
  p.capacity = inputs.capacity;
  p.counts = mutable_data<int32_t>(result.counts);

  cpu::level();  // throws here, not in a thread, if MUSTDROP_CPU_CAPABILITY is wrong
  const int64_t workers = worker_count(batch, length, kGrainTokens);
  const int64_t padded = (length + 63) / 64 * 64;
  const std::unique_ptr<uint32_t[]> keys(new uint32_t[workers * padded]);
  share_items(batch, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    cpu::SelectParameters own = p;
    own.candidate_keys = keys.get() + worker * padded;
    cpu::select_tokens(own, begin, end);
  });
  return result;
}

struct CpuKernels {
  explicit CpuKernels(const Tensor&) {}

  Scores text_vision_scores(const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                            const OptionalTensor& lse) const {
    return compute_text_vision_scores(q, k, token_types, scale, lse);
  }

  Selected select_dual(const SelectInputs& inputs, const Tensor& peak, double global_threshold,
                       double individual_threshold) const {
    cpu::SelectParameters p{};
    p.rule = cpu::Rule::dual;
    p.peak = peak.const_data_ptr();
    p.peak_stride = peak.stride(0);
    p.global_threshold = static_cast<float>(global_threshold);
    p.individual_threshold = static_cast<float>(individual_threshold);
    return run(p, inputs);
  }

  Selected select_topk(const SelectInputs& inputs, int64_t k, const OptionalTensor& budgets) const {
    cpu::SelectParameters p{};
    p.rule = cpu::Rule::topk;
    p.k = k;
    if (budgets) {
      p.budgets = data<int32_t>(*budgets);
      p.budget_stride = budgets->stride(0);
    }
    return run(p, inputs);
  }
};

using Operators = SelectOperators<CpuKernels>;

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) {
  m.impl("select_dual", TORCH_BOX(&mustdrop::Operators::select_dual));
  m.impl("select_topk", TORCH_BOX(&mustdrop::Operators::select_topk));
  m.impl("dual_attention_select", TORCH_BOX(&mustdrop::Operators::dual_attention_select));
  m.impl("topk_attention_select", TORCH_BOX(&mustdrop::Operators::topk_attention_select));
}
