// SPDX-License-Identifier: Apache-2.0
// text_vision_scores in its layouts and text_vision_attention on the CPU: checks, allocation, layout of each sequence.
#include "attention_scores/cpu.h"

#include <algorithm>

#include "attention_scores/checks.h"
#include "attention_scores/cpu_plan.h"
#include "common/cpu_element.h"

namespace mustdrop {
namespace {

constexpr int64_t kNoLimit = INT64_MAX;

// ---------------------------------------------------------------------------------------------- layouts

// Sets the fields that do not depend on the layout. Dimensions of q and k are given by index.
ScoreInputs inputs_of(const Tensor& q, int64_t q_heads, int64_t q_rows, const Tensor& k, int64_t k_heads,
                      int64_t k_rows, double scale, const OptionalTensor& lse) {
  const int64_t last = q.dim() - 1;
  ScoreInputs inputs{};
  inputs.q = q.const_data_ptr(), inputs.k = k.const_data_ptr();
  inputs.element = element_of(q);
  inputs.heads = q.size(q_heads), inputs.kv_heads = k.size(k_heads), inputs.dim = q.size(last);
  inputs.q_head = q.stride(q_heads), inputs.q_row = q.stride(q_rows);
  inputs.k_head = k.stride(k_heads), inputs.k_row = k.stride(k_rows);
  inputs.k_dim = k.size(k.dim() - 1) > 1 ? k.stride(k.dim() - 1) : 1;
  inputs.scale = static_cast<float>(scale);
  if (lse) {
    inputs.lse = data<float>(*lse);
    inputs.lse_head = lse->stride(lse->dim() - 2), inputs.lse_row = lse->stride(lse->dim() - 1);
  }
  return inputs;
}

// Sequence b of dense tensors; the caller sets the results.
ScoreSequence dense_sequence(const Tensor& q, const Tensor& k, const Tensor& token_types, const OptionalTensor& lse,
                             int64_t b) {
  ScoreSequence sequence{};
  sequence.rows = q.size(2), sequence.length = k.size(2);
  sequence.q_begin = b * q.stride(0), sequence.k_begin = b * k.stride(0);
  sequence.lse_begin = lse ? b * lse->stride(0) : 0;
  sequence.types = data<uint8_t>(token_types) + b * token_types.stride(0);
  sequence.max_rows = kNoLimit;
  return sequence;
}

// A sequence's range in a packed tensor, clamped to the tensor and to the longest length.
struct Span {
  int64_t begin, length;
};

Span span_of(const int32_t* cumulative, int64_t b, int64_t extent, int64_t longest) {
  const int64_t begin = std::clamp<int64_t>(cumulative[b], 0, extent);
  const int64_t end = std::clamp<int64_t>(cumulative[b + 1], 0, extent);
  return {begin, std::clamp<int64_t>(end - begin, 0, std::min(extent, longest))};
}

}  // namespace

Scores compute_text_vision_scores(const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                                  const OptionalTensor& lse) {
  const int64_t length = k.size(2);
  Tensor total = new_zeros(q, {q.size(0), length}, ScalarType::Float);
  Tensor peak = new_zeros(q, {q.size(0), length}, ScalarType::Float);
  std::vector<ScoreSequence> sequences;
  for (int64_t b = 0; b < q.size(0); ++b) {
    sequences.push_back(dense_sequence(q, k, token_types, lse, b));
    sequences.back().total = mutable_data<float>(total) + b * length;
    sequences.back().peak = mutable_data<float>(peak) + b * length;
  }
  run_scores(inputs_of(q, 1, 2, k, 1, 2, scale, lse), sequences, q);
  return {total, peak};
}

namespace {

std::tuple<Tensor, Tensor> text_vision_scores(const Tensor& q,            // [B, Hq, Lq, D]
                                              const Tensor& k,            // [B, Hk, Lk, D]
                                              const Tensor& token_types,  // [B, Lk]
                                              double scale,
                                              const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_text_vision_scores("text_vision_scores", q, k, token_types, lse);
  const auto [total, peak] = compute_text_vision_scores(q, k, token_types, scale, lse);
  return {total, peak};
}

Tensor text_vision_attention(const Tensor& q,            // [B, Hq, Lq, D]
                             const Tensor& k,            // [B, Hk, Lk, D]
                             const Tensor& token_types,  // [B, Lk]
                             double scale, int64_t max_query,
                             const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_text_vision_attention(q, k, token_types, max_query, lse);
  const int64_t length = k.size(2);
  Tensor map = new_zeros(q, {q.size(0), max_query, length}, ScalarType::Float);
  std::vector<ScoreSequence> sequences;
  for (int64_t b = 0; b < q.size(0); ++b) {
    sequences.push_back(dense_sequence(q, k, token_types, lse, b));
    sequences.back().map = mutable_data<float>(map) + b * max_query * length;
    sequences.back().map_stride = length;
    sequences.back().max_rows = max_query;
  }
  run_scores(inputs_of(q, 1, 2, k, 1, 2, scale, lse), sequences, q);
  return map;
}

std::tuple<Tensor, Tensor> text_vision_scores_varlen(const Tensor& q,             // [total_q, Hq, D]
                                                     const Tensor& k,             // [total_k, Hk, D]
                                                     const Tensor& token_types,   // [total_k]
                                                     const Tensor& cu_seqlens_q,  // [B+1]
                                                     const Tensor& cu_seqlens_k,  // [B+1]
                                                     int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                     const OptionalTensor& lse) {  // [Hq, total_q]
  check_text_vision_scores_varlen(q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lse);
  Tensor total = new_zeros(q, {k.size(0)}, ScalarType::Float), peak = new_zeros(q, {k.size(0)}, ScalarType::Float);
  const int64_t lse_row = lse ? lse->stride(1) : 0;
  std::vector<ScoreSequence> sequences;
  int64_t taken = 0;  // results before it belong to earlier sequences
  for (int64_t b = 0; b + 1 < cu_seqlens_q.size(0); ++b) {
    const Span rows = span_of(data<int32_t>(cu_seqlens_q), b, q.size(0), max_seqlen_q);
    const Span keys = span_of(data<int32_t>(cu_seqlens_k), b, k.size(0), max_seqlen_k);
    ScoreSequence sequence{};
    sequence.rows = rows.length, sequence.length = keys.length;
    sequence.q_begin = rows.begin * q.stride(0), sequence.k_begin = keys.begin * k.stride(0);
    sequence.lse_begin = rows.begin * lse_row;
    sequence.types = data<uint8_t>(token_types) + keys.begin;
    sequence.total = mutable_data<float>(total) + keys.begin, sequence.peak = mutable_data<float>(peak) + keys.begin;
    sequence.max_rows = kNoLimit;
    sequence.overwrites = keys.begin < taken;
    taken = std::max(taken, keys.begin + keys.length);
    sequences.push_back(sequence);
  }
  run_scores(inputs_of(q, 1, 0, k, 1, 0, scale, lse), sequences, q);
  return {total, peak};
}

std::tuple<Tensor, Tensor> text_vision_scores_paged(const Tensor& q,             // [total_q, Hq, D]
                                                    const Tensor& k_cache,       // [blocks, page_size, Hk, D]
                                                    const Tensor& block_table,   // [B, max_blocks]
                                                    const Tensor& seq_lens,      // [B]
                                                    const Tensor& token_types,   // [B, max_len]
                                                    const Tensor& cu_seqlens_q,  // [B+1]
                                                    int64_t max_seqlen_q, double scale,
                                                    const OptionalTensor& lse) {  // [Hq, total_q]
  check_text_vision_scores_paged(q, k_cache, block_table, seq_lens, token_types, cu_seqlens_q, max_seqlen_q, lse);
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  const int64_t longest = token_types.size(1), page_size = k_cache.size(1);
  Tensor total = new_zeros(q, {batch, longest}, ScalarType::Float);
  Tensor peak = new_zeros(q, {batch, longest}, ScalarType::Float);
  ScoreInputs inputs = inputs_of(q, 1, 0, k_cache, 2, 1, scale, lse);
  inputs.blocks = k_cache.size(0), inputs.page_size = page_size, inputs.k_block = k_cache.stride(0);
  const int64_t lse_row = lse ? lse->stride(1) : 0;
  std::vector<ScoreSequence> sequences;
  for (int64_t b = 0; b < batch; ++b) {
    const Span rows = span_of(data<int32_t>(cu_seqlens_q), b, q.size(0), max_seqlen_q);
    ScoreSequence sequence{};
    sequence.rows = rows.length;
    sequence.length =
        std::clamp<int64_t>(data<int32_t>(seq_lens)[b], 0, std::min(longest, block_table.size(1) * page_size));
    sequence.q_begin = rows.begin * q.stride(0);
    sequence.lse_begin = rows.begin * lse_row;
    sequence.table = data<int32_t>(block_table) + b * block_table.stride(0);
    sequence.types = data<uint8_t>(token_types) + b * token_types.stride(0);
    sequence.total = mutable_data<float>(total) + b * longest, sequence.peak = mutable_data<float>(peak) + b * longest;
    sequence.max_rows = kNoLimit;
    sequences.push_back(sequence);
  }
  run_scores(inputs, sequences, q);
  return {total, peak};
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) {
  m.impl("text_vision_scores", TORCH_BOX(&mustdrop::text_vision_scores));
  m.impl("text_vision_scores_varlen", TORCH_BOX(&mustdrop::text_vision_scores_varlen));
  m.impl("text_vision_scores_paged", TORCH_BOX(&mustdrop::text_vision_scores_paged));
  m.impl("text_vision_attention", TORCH_BOX(&mustdrop::text_vision_attention));
}
