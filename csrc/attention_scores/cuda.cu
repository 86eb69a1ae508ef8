// SPDX-License-Identifier: Apache-2.0
// cls_attention, the text_vision_* operators and the fused selections on CUDA: checks, allocation, parameters.
#include "attention_scores/checks.h"
#include "attention_scores/cls_kernel.cuh"
#include "attention_scores/launch.h"
#include "select/checks.h"
#include "select/launch.h"

namespace mustdrop {
namespace {

using Scores = std::tuple<Tensor, Tensor>;
using ScoredSelection = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T, int V>
void launch_cls(const Device& device, const Tensor& like, ClsParameters p, int64_t batch) {
  const DeviceFacts facts = device.facts();
  p.groups = std::min(p.heads, 8);
  p.per_group = static_cast<int32_t>(ceil_div(p.heads, p.groups));
  p.lanes_per_key = 1;
  while (p.lanes_per_key < static_cast<int>(kWarp) && p.lanes_per_key * V < p.dim) p.lanes_per_key *= 2;
  const int64_t fixed = (kWarp + p.dim) * 4, sums = 2 * p.length * 4;
  const bool fits = fixed + sums <= facts.shared_bytes, together = fits && has_clusters(facts);
  const int64_t spill = fits ? 0 : batch * p.groups * 2 * p.length, partial = together ? 0 : batch * p.groups * p.length;
  std::optional<Workspace> workspace;
  if (!together) {
    workspace.emplace(like, Workspace::size(spill * 4) + Workspace::size(partial * 4));
    p.spill = fits ? nullptr : workspace->take<float>(spill);
    p.partial = workspace->take<float>(partial);
  }
  const Grid grid{dim3(blocks(batch * p.groups)), kClsThreads, static_cast<size_t>(fixed + (fits ? sums : 0)),
                  together ? static_cast<unsigned>(p.groups) : 1};
  device.launch(grid, cls_kernel<T, V>, p);
  if (!together) device.launch({dim3(blocks(ceil_div(p.length, kClsThreads)), blocks(batch)), kClsThreads}, cls_mean_kernel, p);
}

Tensor cls_attention(const Tensor& q,               // [B, H, D]
                     const Tensor& k,               // [B, H, S, D]
                     double scale,
                     const OptionalTensor& counts,  // [B]
                     int64_t num_prefix_tokens) {
  check_cls_attention(q, k, counts, num_prefix_tokens);
  const Device device(q);
  const int64_t batch = q.size(0), length = k.size(2);
  if (batch == 0 || length == 0 || q.size(1) == 0) return new_zeros(q, {batch, length}, ScalarType::Float);
  Tensor out = new_empty(q, {batch, length}, ScalarType::Float);
  ClsParameters p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.counts = counts ? data<int32_t>(*counts) : nullptr;
  p.count_stride = counts ? counts->stride(0) : 0;
  p.out = mutable_data<float>(out);
  p.q_batch_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k_batch_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.k_row_stride = k.stride(2);
  p.length = length;
  p.prefix = num_prefix_tokens;
  p.heads = static_cast<int32_t>(q.size(1));
  p.dim = static_cast<int32_t>(q.size(2));
  p.scale = static_cast<float>(scale);
  with_float_type(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    aligned16(k, p.dim) ? launch_cls<T, kVector>(device, q, p, batch) : launch_cls<T, 1>(device, q, p, batch);
  });
  return out;
}

// What dense, packed and paged inputs have in common.
ScoreParameters describe(const Tensor& q, const Tensor& k, int64_t head_dim, const Tensor& token_types, double scale) {
  ScoreParameters p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.types = data<uint8_t>(token_types);
  p.heads = static_cast<int32_t>(q.size(1));
  p.key_heads = static_cast<int32_t>(k.size(head_dim));
  p.dim = static_cast<int32_t>(q.size(q.dim() - 1));
  p.k_head = k.stride(head_dim);
  p.k_element = p.dim > 1 ? k.stride(k.dim() - 1) : 1;
  p.q_head = q.stride(1);
  p.scale = static_cast<float>(scale);
  return p;
}

bool aligned(const Tensor& q, const Tensor& k, const ScoreParameters& p) {
  return p.dim > 0 && aligned16(q, p.dim) && aligned16(k, p.dim) && p.k_element == 1;
}

ScoreParameters describe_dense(const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                               const OptionalTensor& lse) {
  ScoreParameters p = describe(q, k, 1, token_types, scale);
  p.q_batch = q.stride(0);
  p.q_row = q.stride(2);
  p.k_batch = k.stride(0);
  p.k_row = k.stride(2);
  p.type_batch = token_types.stride(0);
  p.rows = q.size(2);
  p.keys = p.out_keys = k.size(2);
  p.partial_rows = q.size(0) * q.size(2);
  if (lse) {
    p.lse = data<float>(*lse);
    p.lse_batch = lse->stride(0);
    p.lse_head = lse->stride(1);
    p.lse_row = lse->stride(2);
  }
  return p;
}

void describe_packed_rows(ScoreParameters& p, const Tensor& q, const Tensor& cu_seqlens_q, int64_t max_seqlen_q,
                          const OptionalTensor& lse) {
  p.cu_q = data<int32_t>(cu_seqlens_q);
  p.q_row = q.stride(0);
  p.total_q = p.partial_rows = q.size(0);
  p.rows = std::min(max_seqlen_q, p.total_q);
  if (lse) {
    p.lse = data<float>(*lse);
    p.lse_head = lse->stride(0);
    p.lse_row = lse->stride(1);
  }
}

// Nothing can vote or be looked at: the results are zeros without a launch.
bool is_empty(const ScoreParameters& p) { return p.heads == 0 || p.rows == 0 || p.keys == 0; }

Scores dense_scores(const Device& device, const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                    const OptionalTensor& lse) {
  ScoreParameters p = describe_dense(q, k, token_types, scale, lse);
  const std::vector<int64_t> shape{q.size(0), k.size(2)};
  if (is_empty(p)) return {new_zeros(q, shape, ScalarType::Float), new_zeros(q, shape, ScalarType::Float)};
  Tensor total = new_empty(q, shape, ScalarType::Float), peak = new_empty(q, shape, ScalarType::Float);
  p.total = mutable_data<float>(total);
  p.peak = mutable_data<float>(peak);
  launch_scores(device, q, p, q.size(0), aligned(q, k, p));
  return {total, peak};
}

Scores text_vision_scores(const Tensor& q,              // [B, Hq, Lq, D]
                          const Tensor& k,              // [B, Hk, Lk, D]
                          const Tensor& token_types,    // [B, Lk]
                          double scale,
                          const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_dense_scores("text_vision_scores", q, k, token_types, lse);
  return dense_scores(Device(q), q, k, token_types, scale, lse);
}

Tensor text_vision_attention(const Tensor& q,            // [B, Hq, Lq, D]
                             const Tensor& k,            // [B, Hk, Lk, D]
                             const Tensor& token_types,  // [B, Lk]
                             double scale, int64_t max_query,
                             const OptionalTensor& lse) {  // [B, Hq, Lq]
  constexpr const char* op = "text_vision_attention";
  check_dense_scores(op, q, k, token_types, lse);
  check_longest(op, "max_query", max_query);
  const Device device(q);
  Tensor map = new_zeros(q, {q.size(0), max_query, k.size(2)}, ScalarType::Float);
  ScoreParameters p = describe_dense(q, k, token_types, scale, lse);
  if (is_empty(p) || max_query == 0) return map;
  p.map = mutable_data<float>(map);
  p.max_query = max_query;
  launch_scores(device, q, p, q.size(0), aligned(q, k, p));
  return map;
}

Scores text_vision_scores_varlen(const Tensor& q,             // [total_q, Hq, D]
                                 const Tensor& k,             // [total_k, Hk, D]
                                 const Tensor& token_types,   // [total_k]
                                 const Tensor& cu_seqlens_q,  // [B+1]
                                 const Tensor& cu_seqlens_k,  // [B+1]
                                 int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                 const OptionalTensor& lse) {  // [Hq, total_q]
  check_varlen_scores(q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lse);
  const Device device(q);
  // Zeros: tokens may belong to no sequence.
  Tensor total = new_zeros(q, {k.size(0)}, ScalarType::Float), peak = new_zeros(q, {k.size(0)}, ScalarType::Float);
  ScoreParameters p = describe(q, k, 1, token_types, scale);
  describe_packed_rows(p, q, cu_seqlens_q, max_seqlen_q, lse);
  p.cu_k = data<int32_t>(cu_seqlens_k);
  p.k_row = k.stride(0);
  p.total_k = k.size(0);
  p.keys = std::min(max_seqlen_k, p.total_k);
  if (is_empty(p)) return {total, peak};
  p.total = mutable_data<float>(total);
  p.peak = mutable_data<float>(peak);
  launch_scores(device, q, p, cu_seqlens_q.size(0) - 1, aligned(q, k, p));
  return {total, peak};
}

Scores text_vision_scores_paged(const Tensor& q,             // [total_q, Hq, D]
                                const Tensor& k_cache,       // [blocks, slots, Hk, D]
                                const Tensor& block_table,   // [B, max_blocks]
                                const Tensor& seq_lens,      // [B]
                                const Tensor& token_types,   // [B, max_len]
                                const Tensor& cu_seqlens_q,  // [B+1]
                                int64_t max_seqlen_q, double scale,
                                const OptionalTensor& lse) {  // [Hq, total_q]
  check_paged_scores(q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, lse);
  const Device device(q);
  const std::vector<int64_t> shape{token_types.size(0), token_types.size(1)};
  ScoreParameters p = describe(q, k_cache, 2, token_types, scale);
  describe_packed_rows(p, q, cu_seqlens_q, max_seqlen_q, lse);
  p.seq_lens = data<int32_t>(seq_lens);
  p.block_table = data<int32_t>(block_table);
  p.table_batch = block_table.stride(0);
  p.type_batch = token_types.stride(0);
  p.k_batch = k_cache.stride(0);
  p.k_row = k_cache.stride(1);
  p.blocks = k_cache.size(0);
  p.slots = k_cache.size(1);
  p.out_keys = token_types.size(1);
  p.keys = std::min(p.out_keys, block_table.size(1) * p.slots);
  if (is_empty(p)) return {new_zeros(q, shape, ScalarType::Float), new_zeros(q, shape, ScalarType::Float)};
  Tensor total = new_empty(q, shape, ScalarType::Float), peak = new_empty(q, shape, ScalarType::Float);
  p.total = mutable_data<float>(total);
  p.peak = mutable_data<float>(peak);
  launch_scores(device, q, p, shape[0], aligned(q, k_cache, p));
  return {total, peak};
}

ScoredSelection dual_attention_select(const Tensor& q,            // [B, Hq, Lq, D]
                                      const Tensor& k,            // [B, Hk, Lk, D]
                                      const Tensor& token_types,  // [B, Lk]
                                      double scale, double global_threshold, double individual_threshold,
                                      const OptionalTensor& protect,  // [B, Lk]
                                      const OptionalTensor& lse,      // [B, Hq, Lq]
                                      OptionalInt capacity, int64_t drop_multiple) {
  constexpr const char* op = "dual_attention_select";
  check_dense_scores(op, q, k, token_types, lse);
  check_selection(op, token_types, protect, capacity, drop_multiple, q);
  const Device device(q);
  const auto [total, peak] = dense_scores(device, q, k, token_types, scale, lse);
  const Selection selection{total, token_types, protect, capacity, drop_multiple};
  const Selected result = launch_select_dual(device, selection, peak, global_threshold, individual_threshold);
  return {result.keep, result.counts, total, peak};
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
  check_dense_scores(op, q, k, token_types, lse);
  check_budget(op, "budget", budget, budgets, q.size(0), q);
  check_selection(op, token_types, protect, capacity, drop_multiple, q);
  const Device device(q);
  const auto [total, peak] = dense_scores(device, q, k, token_types, scale, lse);
  const Selection selection{total, token_types, protect, capacity, drop_multiple};
  const Selected result = launch_select_topk(device, selection, budget, budgets);
  return {result.keep, result.counts, total, peak};
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(mustdrop, CUDA, m) {
  m.impl("cls_attention", TORCH_BOX(&mustdrop::cls_attention));
  m.impl("text_vision_scores", TORCH_BOX(&mustdrop::text_vision_scores));
  m.impl("text_vision_scores_varlen", TORCH_BOX(&mustdrop::text_vision_scores_varlen));
  m.impl("text_vision_scores_paged", TORCH_BOX(&mustdrop::text_vision_scores_paged));
  m.impl("text_vision_attention", TORCH_BOX(&mustdrop::text_vision_attention));
  m.impl("dual_attention_select", TORCH_BOX(&mustdrop::dual_attention_select));
  m.impl("topk_attention_select", TORCH_BOX(&mustdrop::topk_attention_select));
}
