// SPDX-License-Identifier: Apache-2.0
// text_vision_scores in its layouts, text_vision_attention and cls_attention on CUDA: checks, allocation, launches.
#include "attention_scores/cuda.h"

#include "attention_scores/checks.h"
#include "attention_scores/cls.cuh"
#include "attention_scores/plan.h"
#include "attention_scores/scores.cuh"

namespace mustdrop {
namespace {

constexpr int64_t kNoLimit = INT_MAX;
constexpr int64_t kMostPartials = 64ll << 20;   // bytes of workspace for partial sums
constexpr int64_t kMostPartBytes = 64ll << 20;  // bytes of workspace for normalizers, unless one part exceeds it

int32_t narrow(int64_t value) {
  if (value > INT_MAX) throw std::runtime_error("mustdrop: a tensor is too large for the attention scores");
  return static_cast<int32_t>(value);
}

// ---------------------------------------------------------------------------------------------- layouts

// Sets the fields that do not depend on the layout. Dimensions of q and k are given by index.
ScoreParameters describe(const Tensor& q, int64_t q_heads, int64_t q_rows, const Tensor& k, int64_t k_heads,
                         int64_t k_rows, const Tensor& token_types, double scale, const OptionalTensor& lse) {
  const int64_t last = k.dim() - 1, dim = q.size(q.dim() - 1);
  ScoreParameters p{};
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr();
  p.token_types = data<uint8_t>(token_types);
  p.heads = narrow(q.size(q_heads)), p.dim = narrow(dim);
  p.group = static_cast<int32_t>(p.heads / std::max<int64_t>(k.size(k_heads), 1));
  p.q_head = q.stride(q_heads), p.q_row = q.stride(q_rows);
  p.k_head = k.stride(k_heads), p.k_row = k.stride(k_rows);
  p.k_dim = k.size(last) > 1 ? k.stride(last) : 1;
  p.scale_log2 = static_cast<float>(scale) * kLog2E;
  if (p.heads > 0) p.head_share = 1.0f / static_cast<float>(p.heads);
  if (lse) {
    p.lse = data<float>(*lse);
    p.lse_head = lse->stride(lse->dim() - 2), p.lse_row = lse->stride(lse->dim() - 1);
  }
  p.max_rows = kNoLimit;
  return p;
}

ScoreParameters describe_dense(const Tensor& q, const Tensor& k, const Tensor& token_types, double scale,
                               const OptionalTensor& lse) {
  ScoreParameters p = describe(q, 1, 2, k, 1, 2, token_types, scale, lse);
  p.batch = narrow(q.size(0));
  p.rows = p.max_rows_q = narrow(q.size(2));
  p.keys = p.max_keys = narrow(k.size(2));
  p.q_batch = q.stride(0), p.k_batch = k.stride(0), p.type_batch = token_types.stride(0);
  if (lse) p.lse_batch = lse->stride(0);
  return p;
}

// ---------------------------------------------------------------------------------------------- launches

// Whether the kernels copy 16 bytes at once: each row of q and k consists of aligned pieces, whose offsets from the
// head's first element have 32 bits in units of a piece.
bool takes_vectors(const ScoreParameters& p, const Tensor& q, const Tensor& k) {
  const auto fits = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += std::max<int64_t>(t.size(d) - 1, 0) * t.stride(d);
    return last * t.element_size() / 16 <= UINT_MAX;
  };
  return p.k_dim == 1 && aligned16(q, p.dim) && aligned16(k, p.dim) && fits(q) && fits(k);
}

// Whether tiles of 128 keys are used: they halve the reads of each row; there must be enough for every multiprocessor.
bool takes_wide_tiles(const ScoreParameters& p, const DeviceFacts& facts, int64_t keys) {
  const int64_t tiles = int64_t(p.batch) * ceil_div(keys, kTileKeys<2>);
  return static_cast<int64_t>(std::max(sizeof(ScoreShared<2>), sizeof(NormalizerShared<2>))) <= facts.shared_bytes &&
         tiles * std::min(kScoreCluster, p.heads) >= facts.multiprocessors;
}

template <class T>
void set_steps(ScoreParameters& p) {
  const int64_t before_last = int64_t(slabs_of<T>(p.dim) - 1) * kSlab<T>;  // elements before the last slab
  p.k_slab = kSlab<T> * p.k_dim;
  p.k_same_head = -before_last * p.k_dim;
  p.k_next_head = p.k_head - before_last * p.k_dim;
  p.q_next_head = p.q_head - before_last;
}

// Distributes the work over blocks; depends on shapes and the device alone. groups_at_once: see split_heads().
template <int M, class GroupsAtOnce>
void plan_blocks(ScoreParameters& p, const DeviceFacts& facts, int64_t keys, const GroupsAtOnce& groups_at_once) {
  p.tiles = narrow(ceil_div(keys, kTileKeys<M>));
  const int64_t tiles = int64_t(p.batch) * p.tiles, heads = int64_t(p.batch) * p.heads;
  // Without clusters the splits and parts are in a workspace.
  const int64_t partial_bytes = tiles * p.row_capacity * kTileKeys<M> * static_cast<int64_t>(sizeof(float));
  const int64_t most_splits = has_clusters(facts) ? kScoreCluster : kMostPartials / std::max<int64_t>(partial_bytes, 1);
  const int64_t most = p.row_capacity > 0 ? std::min<int64_t>(kScoreCluster, most_splits) : 1;
  p.split_bits = split_heads(tiles, p.heads, most, groups_at_once);

  const int64_t longest = std::max<int64_t>(ceil_div(p.max_keys, kTileKeys<M>), 1);
  const int64_t part_bytes = heads * p.row_capacity * static_cast<int64_t>(sizeof(RowPart));
  const int64_t most_parts = has_clusters(facts) ? kMostParts : kMostPartBytes / std::max<int64_t>(part_bytes, 1);
  p.part_splits = 1 << split_keys(heads, longest, facts.multiprocessors, std::min<int64_t>(kMostParts, most_parts));
  p.part_count = has_clusters(facts) ? 1 : p.part_splits;
  p.part_tiles = narrow(ceil_div(longest, p.part_splits));
}

template <class T, int M, bool kVector>
void launch_tiles(const Device& device, const Tensor& like, ScoreParameters p, int64_t keys) {
  const DeviceFacts facts = device.facts();
  const auto score =
      p.lse ? MUSTDROP_KERNEL(score_kernel<T, M, true, kVector>) : MUSTDROP_KERNEL(score_kernel<T, M, false, kVector>);
  const auto groups_at_once = [&](int32_t bits) {
    const Grid grid{dim3(1u << bits), kScoreThreads, sizeof(ScoreShared<M>), 1u << bits};
    return bits > 0 && has_clusters(facts) ? device.clusters_at_once(grid, score) : facts.multiprocessors >> bits;
  };
  plan_blocks<M>(p, facts, keys, groups_at_once);
  set_steps<T>(p);
  const int64_t tiles = narrow(int64_t(p.batch) * p.tiles), heads = int64_t(p.batch) * p.heads;
  const bool makes_parts = !p.lse && p.row_capacity > 0, clusters = has_clusters(facts);
  const bool uses_partials = !clusters && p.split_bits > 0;
  const int64_t groups = std::min<int64_t>(tiles, groups_at_once(p.split_bits));
  const int64_t parts = makes_parts ? heads * p.row_capacity * p.part_count : 0;
  const int64_t partials = uses_partials ? (tiles << p.split_bits) * p.row_capacity * kTileKeys<M> : 0;
  Workspace workspace(like, Workspace::size(parts * sizeof(RowPart)) + Workspace::size(partials * sizeof(float)));
  p.parts = workspace.allocate<RowPart>(parts);
  if (uses_partials) p.partials = workspace.allocate<float>(partials);

  if (makes_parts)
    device.launch({dim3(blocks(heads * p.part_splits)), kScoreThreads, sizeof(NormalizerShared<M>),
                   clusters ? static_cast<unsigned>(p.part_splits) : 1u},
                  MUSTDROP_KERNEL(normalizer_kernel<T, M, kVector>), p);
  device.launch({dim3(blocks(groups << p.split_bits)), kScoreThreads, sizeof(ScoreShared<M>),
                 clusters ? 1u << p.split_bits : 1u, makes_parts},
                score, p);
  if (uses_partials)
    device.launch({dim3(blocks(tiles)), kScoreThreads, sizeof(ScoreShared<M>)}, MUSTDROP_KERNEL(score_finish_kernel<M>),
                  p);
}

// `p` is set but for the plan and the workspaces; there is at least one sequence and head.
void launch_scores(const Device& device, const Tensor& q, const Tensor& k, ScoreParameters p) {
  const int64_t keys = p.cu_k ? p.max_keys : p.keys;  // the most keys of a sequence
  if (keys == 0) return;
  p.row_capacity = std::min({p.max_rows_q, p.rows, p.max_rows});
  const bool vectors = takes_vectors(p, q, k);
  with_float_type(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!vectors) return launch_tiles<T, 1, false>(device, q, p, keys);
    if constexpr (sizeof(T) == 2) {
      if (takes_wide_tiles(p, device.facts(), keys)) return launch_tiles<T, 2, true>(device, q, p, keys);
    }
    launch_tiles<T, 1, true>(device, q, p, keys);
  });
}

// total and peak of this shape. `whole`: the kernel writes every element.
Scores run_scores(const Device& device, const Tensor& q, const Tensor& k, ScoreParameters p, std::vector<int64_t> shape,
                  bool whole) {
  const bool runs = p.batch > 0 && p.heads > 0;
  const auto allocate = whole && runs ? new_empty : new_zeros;
  Scores scores{allocate(q, shape, ScalarType::Float), allocate(q, shape, ScalarType::Float)};
  p.total = mutable_data<float>(scores.total), p.peak = mutable_data<float>(scores.peak);
  if (runs) launch_scores(device, q, k, p);
  return scores;
}

}  // namespace

Scores launch_text_vision_scores(const Device& device, const Tensor& q, const Tensor& k, const Tensor& token_types,
                                 double scale, const OptionalTensor& lse) {
  return run_scores(device, q, k, describe_dense(q, k, token_types, scale, lse), {k.size(0), k.size(2)}, true);
}

// ---------------------------------------------------------------------------------------------- operators

namespace {

std::tuple<Tensor, Tensor> text_vision_scores(const Tensor& q,            // [B, Hq, Lq, D]
                                              const Tensor& k,            // [B, Hk, Lk, D]
                                              const Tensor& token_types,  // [B, Lk]
                                              double scale,
                                              const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_text_vision_scores("text_vision_scores", q, k, token_types, lse);
  const auto [total, peak] = launch_text_vision_scores(Device(q), q, k, token_types, scale, lse);
  return {total, peak};
}

std::tuple<Tensor, Tensor> text_vision_scores_varlen(const Tensor& q,             // [total_q, Hq, D]
                                                     const Tensor& k,             // [total_k, Hk, D]
                                                     const Tensor& token_types,   // [total_k]
                                                     const Tensor& cu_seqlens_q,  // [B+1]
                                                     const Tensor& cu_seqlens_k,  // [B+1]
                                                     int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                     const OptionalTensor& lse) {  // [Hq, total_q]
  check_text_vision_scores_varlen(q, k, token_types, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lse);
  const Device device(q);
  ScoreParameters p = describe(q, 1, 0, k, 1, 0, token_types, scale, lse);
  p.batch = narrow(cu_seqlens_q.size(0) - 1);
  p.rows = narrow(q.size(0)), p.max_rows_q = narrow(std::min(max_seqlen_q, q.size(0)));
  p.keys = narrow(k.size(0)), p.max_keys = narrow(std::min(max_seqlen_k, k.size(0)));
  p.cu_q = data<int32_t>(cu_seqlens_q), p.cu_k = data<int32_t>(cu_seqlens_k);
  const Scores scores = run_scores(device, q, k, p, {k.size(0)}, false);  // gaps between the sequences stay zero
  return {scores.total, scores.peak};
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
  const Device device(q);
  ScoreParameters p = describe(q, 1, 0, k_cache, 2, 1, token_types, scale, lse);
  p.batch = narrow(cu_seqlens_q.size(0) - 1);
  p.rows = narrow(q.size(0)), p.max_rows_q = narrow(std::min(max_seqlen_q, q.size(0)));
  p.blocks = narrow(k_cache.size(0)), p.page_size = narrow(k_cache.size(1)), p.max_blocks = narrow(block_table.size(1));
  p.keys = narrow(token_types.size(1)),
  p.max_keys = narrow(std::min(token_types.size(1), block_table.size(1) * p.page_size));
  p.type_batch = token_types.stride(0), p.table_batch = block_table.stride(0), p.k_block = k_cache.stride(0);
  p.cu_q = data<int32_t>(cu_seqlens_q), p.seq_lens = data<int32_t>(seq_lens), p.table = data<int32_t>(block_table);
  const Scores scores = run_scores(device, q, k_cache, p, {p.batch, p.keys}, true);
  return {scores.total, scores.peak};
}

Tensor text_vision_attention(const Tensor& q,            // [B, Hq, Lq, D]
                             const Tensor& k,            // [B, Hk, Lk, D]
                             const Tensor& token_types,  // [B, Lk]
                             double scale, int64_t max_query,
                             const OptionalTensor& lse) {  // [B, Hq, Lq]
  check_text_vision_attention(q, k, token_types, max_query, lse);
  const Device device(q);
  Tensor map = new_zeros(q, {q.size(0), max_query, k.size(2)}, ScalarType::Float);
  ScoreParameters p = describe_dense(q, k, token_types, scale, lse);
  p.max_rows = narrow(max_query);
  p.map = mutable_data<float>(map);
  if (p.batch > 0 && p.heads > 0 && p.max_rows > 0 && p.keys > 0) launch_scores(device, q, k, p);
  return map;
}

// ---------------------------------------------------------------------------------------------- cls_attention

template <class T, int V>
void launch_cls(const Device& device, const Tensor& q, ClsParameters p) {
  const DeviceFacts facts = device.facts();
  const bool cluster = has_clusters(facts);
  p.pieces = narrow(ceil_div(p.dim, V));
  p.lanes = 1;
  while (p.lanes < static_cast<int32_t>(kWarp) && p.lanes < p.pieces) p.lanes *= 2;
  p.groups = kClsThreads / p.lanes;
  p.splits = 1;
  while (p.splits < kClsCluster && 2 * p.splits <= p.heads) p.splits *= 2;
  const int64_t bytes = cls_shared_bytes(p.dim, p.span);
  const bool held = bytes <= facts.shared_bytes;
  const int64_t count = int64_t(p.batch) * p.splits * p.span;
  const bool uses_partials = !(cluster && held);  // without clusters blocks exchange sums here
  Workspace workspace(q, uses_partials ? Workspace::size(count * 4) * (held ? 1 : 2) : 0);
  if (uses_partials) p.partials = workspace.allocate<float>(count);
  if (!held) p.scores = workspace.allocate<float>(count);
  device.launch({dim3(blocks(int64_t(p.batch) * p.splits)), kClsThreads,
                 static_cast<size_t>(held ? bytes : cls_shared_bytes(p.dim, 0)),
                 uses_partials ? 1u : static_cast<unsigned>(p.splits)},
                MUSTDROP_KERNEL(cls_kernel<T, V>), p);
  if (uses_partials)
    device.launch({dim3(blocks(int64_t(p.batch) * ceil_div(p.span, kClsThreads))), kClsThreads},
                  MUSTDROP_KERNEL(cls_finish_kernel), p);
}

Tensor cls_attention(const Tensor& q,  // [B, H, D]
                     const Tensor& k,  // [B, H, S, D]
                     double scale,
                     const OptionalTensor& counts,  // [B]
                     int64_t num_prefix_tokens) {
  check_cls_attention(q, k, counts, num_prefix_tokens);
  const Device device(q);
  const int64_t batch = q.size(0), heads = q.size(1), span = k.size(2), dim = q.size(2);
  if (batch * heads * span == 0) return new_zeros(q, {batch, span}, ScalarType::Float);
  Tensor out = new_empty(q, {batch, span}, ScalarType::Float);
  ClsParameters p{};
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr();
  p.q_batch = q.stride(0), p.q_head = q.stride(1);
  p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_row = k.stride(2);
  p.batch = narrow(batch), p.heads = narrow(heads), p.span = narrow(span), p.dim = narrow(dim);
  p.prefix = narrow(std::min(num_prefix_tokens, span));
  p.counts = counts ? data<int32_t>(*counts) : nullptr;
  p.count_stride = counts ? counts->stride(0) : 0;
  p.scale_log2 = static_cast<float>(scale) * kLog2E;
  p.head_share = 1.0f / static_cast<float>(heads);
  p.out = mutable_data<float>(out);
  with_float_type(q.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    aligned16(k, dim) ? launch_cls<T, kVector>(device, q, p) : launch_cls<T, 1>(device, q, p);
  });
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("cls_attention", TORCH_BOX(&mustdrop::cls_attention));
  m.impl("text_vision_scores", TORCH_BOX(&mustdrop::text_vision_scores));
  m.impl("text_vision_scores_varlen", TORCH_BOX(&mustdrop::text_vision_scores_varlen));
  m.impl("text_vision_scores_paged", TORCH_BOX(&mustdrop::text_vision_scores_paged));
  m.impl("text_vision_attention", TORCH_BOX(&mustdrop::text_vision_attention));
}
