// SPDX-License-Identifier: Apache-2.0
// select_dual, select_topk and their fusions with the scores on the CPU: sequences are spread over the threads.
#include <memory>

#include "attention_scores/checks.h"
#include "attention_scores/cpu.h"
#include "common/arguments.h"
#include "common/workers.h"
#include "select/cpu_kernel.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainTokens = 4096;  // least work of a thread

using Selection = std::tuple<Tensor, Tensor>;                        // keep [B, L or capacity], counts [B]
using ScoredSelection = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // and total and peak, [B, L]

struct Options {
  const OptionalTensor& protect;  // [B, L]
  OptionalInt capacity;
  int64_t drop_multiple;
};

void check_options(const char* op, const Tensor& token_types, const Options& options, const Tensor& like) {
  const int64_t batch = token_types.size(0), length = token_types.size(1);
  if (options.protect) check_tensor(op, "protected", *options.protect, {batch, length}, ScalarType::Bool, like);
  if (options.capacity) check_at_least(op, "capacity", *options.capacity, 0);
  check_at_least(op, "drop_multiple", options.drop_multiple, 1);
}

void check_budget(const char* op, const char* name, int64_t budget, const OptionalTensor& budgets, int64_t batch,
                  const Tensor& like) {
  check_at_least(op, name, budget, 0);
  if (budgets) check_tensor(op, "budgets", *budgets, {batch}, ScalarType::Int, like, true);
}

// Fills what all rules share, runs the kernel, returns its results. The arguments are checked.
Selection run(cpu::SelectArgs args, const Tensor& score, const Tensor& token_types, const Options& options) {
  const int64_t batch = score.size(0), length = score.size(1), capacity = options.capacity.value_or(length);
  Tensor keep = new_empty(score, {batch, capacity}, ScalarType::Long);
  Tensor counts = new_empty(score, {batch}, ScalarType::Int);
  args.element = element_of(score);
  args.score = score.const_data_ptr();
  args.score_stride = score.stride(0);
  args.types = static_cast<const uint8_t*>(token_types.const_data_ptr());
  args.types_stride = token_types.stride(0);
  if (options.protect) {
    args.keeps = static_cast<const uint8_t*>(options.protect->const_data_ptr());
    args.keeps_stride = options.protect->stride(0);
  }
  args.length = length;
  args.drop_multiple = options.drop_multiple;
  args.keep = static_cast<int64_t*>(keep.mutable_data_ptr());
  args.capacity = capacity;
  args.counts = static_cast<int32_t*>(counts.mutable_data_ptr());

  cpu::level();  // throws here, and not in a thread, where MUSTDROP_CPU_CAPABILITY is wrong
  const int64_t workers = worker_count(batch, length, kGrainTokens);
  const int64_t padded = (length + 63) / 64 * 64;
  const std::unique_ptr<uint32_t[]> keys(new uint32_t[workers * padded]);
  share_items(batch, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    cpu::SelectArgs own = args;
    own.narrow = keys.get() + worker * padded;
    cpu::select_tokens(own, begin, end);
  });
  return {keep, counts};
}

Selection run_dual(const Tensor& total, const Tensor& peak, const Tensor& token_types, double global_threshold,
                   double individual_threshold, const Options& options) {
  cpu::SelectArgs args{};
  args.rule = cpu::Rule::dual;
  args.peak = peak.const_data_ptr();
  args.peak_stride = peak.stride(0);
  args.global_threshold = static_cast<float>(global_threshold);
  args.individual_threshold = static_cast<float>(individual_threshold);
  return run(args, total, token_types, options);
}

Selection run_topk(const Tensor& scores, const Tensor& token_types, int64_t k, const OptionalTensor& budgets,
                   const Options& options) {
  cpu::SelectArgs args{};
  args.rule = cpu::Rule::topk;
  args.k = k;
  if (budgets) {
    args.budgets = static_cast<const int32_t*>(budgets->const_data_ptr());
    args.budgets_stride = budgets->stride(0);
  }
  return run(args, scores, token_types, options);
}

Selection select_dual(const Tensor& total,        // [B, L]
                      const Tensor& peak,         // [B, L]
                      const Tensor& token_types,  // [B, L]
                      double global_threshold, double individual_threshold,
                      const OptionalTensor& protect,  // [B, L]
                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "select_dual";
  check_extents(op, "total", total, {"B", "L"});
  check_computed(op, "total", total);
  check_last_dense(op, "total", total);
  const int64_t batch = total.size(0), length = total.size(1);
  check_tensor(op, "peak", peak, {batch, length}, total.scalar_type(), total);
  check_tensor(op, "token_types", token_types, {batch, length}, ScalarType::Byte, total);
  const Options options{protect, capacity, drop_multiple};
  check_options(op, token_types, options, total);
  return run_dual(total, peak, token_types, global_threshold, individual_threshold, options);
}

Selection select_topk(const Tensor& scores,       // [B, L]
                      const Tensor& token_types,  // [B, L]
                      int64_t k,
                      const OptionalTensor& budgets,  // [B]
                      const OptionalTensor& protect,  // [B, L]
                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "select_topk";
  check_extents(op, "scores", scores, {"B", "L"});
  check_computed(op, "scores", scores);
  check_last_dense(op, "scores", scores);
  check_tensor(op, "token_types", token_types, {scores.size(0), scores.size(1)}, ScalarType::Byte, scores);
  check_budget(op, "k", k, budgets, scores.size(0), scores);
  const Options options{protect, capacity, drop_multiple};
  check_options(op, token_types, options, scores);
  return run_topk(scores, token_types, k, budgets, options);
}

ScoredSelection with_scores(const Selection& selection, const Tensor& total, const Tensor& peak) {
  return {std::get<0>(selection), std::get<1>(selection), total, peak};
}

ScoredSelection dual_attention_select(const Tensor& q,            // [B, Hq, Lq, D]
                                      const Tensor& k,            // [B, Hk, Lk, D]
                                      const Tensor& token_types,  // [B, Lk]
                                      double scale, double global_threshold, double individual_threshold,
                                      const OptionalTensor& protect,  // [B, Lk]
                                      const OptionalTensor& lse,      // [B, Hq, Lq]
                                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "dual_attention_select";
  const Options options{protect, capacity, drop_multiple};
  check_text_vision_scores(op, q, k, token_types, lse);
  check_options(op, token_types, options, q);
  const auto [total, peak] = text_vision_scores(op, q, k, token_types, scale, lse);
  return with_scores(run_dual(total, peak, token_types, global_threshold, individual_threshold, options), total, peak);
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
  const Options options{protect, capacity, drop_multiple};
  check_text_vision_scores(op, q, k, token_types, lse);
  check_budget(op, "budget", budget, budgets, q.size(0), q);
  check_options(op, token_types, options, q);
  const auto [total, peak] = text_vision_scores(op, q, k, token_types, scale, lse);
  return with_scores(run_topk(total, token_types, budget, budgets, options), total, peak);
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) {
  m.impl("select_dual", TORCH_BOX(&mustdrop::select_dual));
  m.impl("select_topk", TORCH_BOX(&mustdrop::select_topk));
  m.impl("dual_attention_select", TORCH_BOX(&mustdrop::dual_attention_select));
  m.impl("topk_attention_select", TORCH_BOX(&mustdrop::topk_attention_select));
}
