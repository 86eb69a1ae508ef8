// SPDX-License-Identifier: Apache-2.0
// compact_kv_ and compact_paged_kv_ on the CPU: the threads share the streams (stream.h) of all layers.
#include "common/workers.h"
#include "compact_kv/checks.h"
#include "compact_kv/stream.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 128 << 10;  // least work of a thread
constexpr int64_t kStreamsPerThread = 4;    // for balance at the end

// --- From tensors to streams ------------------------------------------------------------------------------------

struct KeepSet {
  const int64_t* keep;    // [B, K] or [B, Hk, K]
  const int32_t* counts;  // [B] or [B, Hk]
  int64_t batch_stride, head_stride, counts_batch_stride, counts_head_stride;
  int64_t capacity;  // K
  bool per_head;
};

KeepSet describe_keep(const Tensor& keep, const Tensor& counts) {
  const bool per_head = keep.dim() == 3;
  return {data<int64_t>(keep),
          data<int32_t>(counts),
          keep.stride(0),
          per_head ? keep.stride(1) : 0,
          counts.stride(0),
          per_head ? counts.stride(1) : 0,
          keep.size(keep.dim() - 1),
          per_head};
}

// The keys or the values of one layer. Strides are in bytes.
struct Cache {
  char* data;
  int64_t batch_stride;  // 0 with a block table
  int64_t batch, heads;
  int64_t groups;         // of heads; a stream moves the heads of one group
  PositionLayout layout;  // with all heads
  SlotMap map;            // without a table
  const KeepSet* set;

  int64_t streams() const { return batch * groups; }
  int64_t bytes() const { return batch * heads * set->capacity * layout.dims * layout.run; }
};

// Layout of one position of a cache: heads, then head_dim.
PositionLayout describe_position(const Tensor& cache, int64_t heads_dim) {
  const int64_t element = static_cast<int64_t>(cache.element_size()), dims = cache.size(3);
  const bool dense = cache.stride(3) == 1 || dims <= 1;
  return {cache.size(heads_dim), cache.stride(heads_dim) * element, dense ? 1 : dims, cache.stride(3) * element,
          dense ? dims * element : element};
}

// Number of groups of heads: single heads if each has its own memory or its own set; else, with a position's heads side
// by side, as many as the threads need.
int64_t head_groups(const Cache& cache, int64_t caches) {
  if (cache.set->per_head || cache.layout.head_stride > cache.map.slot_stride) return cache.heads;
  const int64_t wanted = torch::stable::get_num_threads() * kStreamsPerThread;
  const int64_t sequences = std::max<int64_t>(1, caches * cache.batch);
  return std::clamp<int64_t>((wanted + sequences - 1) / sequences, 1, cache.heads);
}

struct CompactParameters {
  std::vector<KeepSet> sets;
  std::vector<Cache> caches;
  const Tensor* block_table = nullptr;  // [B, max_blocks]
  const Tensor* seq_lens = nullptr;     // [B]
  bool align_end = false;
};

Stream make_stream(const CompactParameters& p, const Cache& cache, const int32_t* table, int64_t table_stride,
                   const int32_t* seq_lens, int64_t seq_lens_stride, int64_t index) {
  const int64_t b = index / cache.groups, group = index % cache.groups;
  const int64_t head = group * cache.heads / cache.groups, end = (group + 1) * cache.heads / cache.groups;
  const KeepSet& set = *cache.set;
  Stream stream{};
  stream.data = cache.data + b * cache.batch_stride + head * cache.layout.head_stride;
  stream.layout = cache.layout;
  stream.layout.heads = end - head;
  if (stream.layout.dims == 1 && cache.layout.head_stride == cache.layout.run) {  // contiguous heads: one piece
    stream.layout.run *= stream.layout.heads;
    stream.layout.heads = 1;
  }
  stream.map = cache.map;
  if (table) stream.map.table = table + b * table_stride;
  stream.keep = set.keep + b * set.batch_stride + head * set.head_stride;
  const int32_t kept = set.counts[b * set.counts_batch_stride + head * set.counts_head_stride];
  stream.count = std::clamp<int64_t>(kept, 0, set.capacity);
  if (p.align_end) stream.target = (seq_lens ? seq_lens[b * seq_lens_stride] : cache.map.page_size) - stream.count;
  stream.backward = p.align_end;
  return stream;
}

void run(const CompactParameters& p) {
  std::vector<int64_t> first{0};  // first stream of each cache, and the end
  int64_t bytes = 0;
  for (const Cache& cache : p.caches) {
    first.push_back(first.back() + cache.streams());
    bytes += cache.bytes();
  }
  const int64_t streams = first.back();
  if (bytes == 0) return;
  const int32_t* table = p.block_table ? data<int32_t>(*p.block_table) : nullptr;
  const int64_t table_stride = table ? p.block_table->stride(0) : 0;
  const int32_t* seq_lens = p.seq_lens ? data<int32_t>(*p.seq_lens) : nullptr;
  const int64_t seq_lens_stride = seq_lens ? p.seq_lens->stride(0) : 0;

  share_items(streams, worker_count(streams, bytes / streams, kGrainBytes), [&](int64_t, int64_t begin, int64_t end) {
    size_t c = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t s = begin; s < end; ++s) {
      while (s >= first[c + 1]) ++c;
      compact(make_stream(p, p.caches[c], table, table_stride, seq_lens, seq_lens_stride, s - first[c]));
    }
  });
}

std::vector<KeepSet> describe_sets(const Tensors& keep, const Tensors& counts) {
  std::vector<KeepSet> sets;
  for (size_t i = 0; i < keep.size(); ++i) sets.push_back(describe_keep(keep[i], counts[i]));
  return sets;
}

// --- The operators ----------------------------------------------------------------------------------------------

void compact_kv_(const Tensors& keys,    // [B, Hk, L, D] each
                 const Tensors& values,  // [B, Hk, L, D] each
                 const Tensors& keep,    // [B, K] or [B, Hk, K]; one, or one per layer
                 const Tensors& counts,  // [B] or [B, Hk]
                 bool align_end) {
  check_compact_kv(keys, values, keep, counts);
  if (keys.empty()) return;

  CompactParameters p{describe_sets(keep, counts), {}, nullptr, nullptr, align_end};
  for (size_t i = 0; i < keys.size(); ++i)
    for (const Tensor* t : {&keys[i], &values[i]}) {
      if (t->numel() == 0) continue;
      const int64_t element = static_cast<int64_t>(t->element_size());
      Cache cache{mutable_data<char>(*t),
                  t->stride(0) * element,
                  t->size(0),
                  t->size(1),
                  1,
                  describe_position(*t, 1),
                  {nullptr, 1, 1, t->size(2), 0, t->stride(2) * element},
                  &p.sets[keep.size() == 1 ? 0 : i]};
      cache.groups = head_groups(cache, 2 * keys.size());
      p.caches.push_back(cache);
    }
  run(p);
}

void compact_paged_kv_(const Tensors& keys,             // [blocks, page_size, Hk, D] each
                       const Tensors& values,           // [blocks, page_size, Hk, D] each
                       const Tensor& block_table,       // [B, max_blocks]
                       const Tensors& keep,             // [B, K] or [B, Hk, K]; one, or one per layer
                       const Tensors& counts,           // [B] or [B, Hk]
                       const OptionalTensor& seq_lens,  // [B]
                       bool align_end) {
  check_compact_paged_kv(keys, values, block_table, keep, counts, seq_lens, align_end);
  if (keys.empty() || block_table.numel() == 0) return;

  CompactParameters p{describe_sets(keep, counts), {}, &block_table, seq_lens ? &*seq_lens : nullptr, align_end};
  for (size_t i = 0; i < keys.size(); ++i)
    for (const Tensor* t : {&keys[i], &values[i]}) {
      if (t->numel() == 0) continue;
      const int64_t element = static_cast<int64_t>(t->element_size());
      const int64_t block_stride = t->stride(0) * element, page_size = t->size(1);
      Cache cache{mutable_data<char>(*t),
                  0,
                  block_table.size(0),
                  t->size(2),
                  1,
                  describe_position(*t, 2),
                  {nullptr, block_table.size(1), t->size(0), page_size, block_stride,
                   page_size == 1 ? block_stride : t->stride(1) * element},
                  &p.sets[keep.size() == 1 ? 0 : i]};
      cache.groups = head_groups(cache, 2 * keys.size());
      p.caches.push_back(cache);
    }
  run(p);
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) {
  m.impl("compact_kv_", TORCH_BOX(&mustdrop::compact_kv_));
  m.impl("compact_paged_kv_", TORCH_BOX(&mustdrop::compact_paged_kv_));
}
