// SPDX-License-Identifier: Apache-2.0
// compact_kv_ and compact_paged_kv_ on the CPU: all layers in one call, cut into streams (stream.h) for the threads.
#include "common/arguments.h"
#include "common/workers.h"
#include "compact_kv/disjoint.h"
#include "compact_kv/stream.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 128 << 10;  // least work of a thread
constexpr int64_t kStreamsPerThread = 4;    // so that the last streams do not leave threads idle

// --- Checks -----------------------------------------------------------------------------------------------------

struct Layout {
  Extents names;   // of the dimensions
  int64_t shared;  // leading dimensions that all layers have in common
  int64_t heads;   // which dimension is Hk
  bool any_strides;
};

void check_not_expanded(const char* op, const Argument& argument, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size() && t.numel() != 0; ++d)
    if (sizes[d] > 1 && strides[d] == 0)
      refuse_argument(op, argument, " must not be expanded (stride 0), got strides ", to_text(strides));
}

void check_caches(const char* op, const Tensors& keys, const Tensors& values, const Layout& layout,
                  const Tensor* like) {
  if (values.size() != keys.size())
    refuse_argument(op, "values", " must hold as many tensors as keys (", keys.size(), "), got ", values.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const Argument key("keys", i), value("values", i);
    check_extents(op, key, keys[i], layout.names);
    check_place(op, key, keys[i], *like);
    if (!layout.any_strides) check_last_dense(op, key, keys[i]);
    check_extents(op, value, values[i], {keys[i].size(0), keys[i].size(1), keys[i].size(2), "D"});
    check_place(op, value, values[i], *like);
    if (!layout.any_strides) check_last_dense(op, value, values[i]);
    for (int64_t d = 0; d < layout.shared; ++d)
      if (keys[i].size(d) != keys[0].size(d))
        refuse_argument(op, key, " must agree with keys[0] in ", layout.names.begin()[d].name, ", got ",
                        shape_of(keys[i]));
    check_not_expanded(op, key, keys[i]);
    check_not_expanded(op, value, values[i]);
  }
}

// Keep sets: one for all layers or one per layer, each (B, K) with (B) or (B, Hk, K) with (B, Hk).
void check_keep(const char* op, int64_t batch, const Tensors& keys, int64_t heads_dim, const Tensors& keep,
                const Tensors& counts, const Tensor& like) {
  if (keep.size() != 1 && keep.size() != keys.size())
    refuse_argument(op, "keep", " must hold one tensor or one per layer (", keys.size(), "), got ", keep.size());
  if (counts.size() != keep.size())
    refuse_argument(op, "counts", " must hold as many tensors as keep (", keep.size(), "), got ", counts.size());
  for (size_t i = 0; i < keep.size(); ++i) {
    const Argument set("keep", i), count("counts", i);
    const int64_t heads = keys[i].size(heads_dim);
    if (keep[i].dim() == 2) {
      check_tensor(op, set, keep[i], {batch, "K"}, ScalarType::Long, like);
      check_tensor(op, count, counts[i], {batch}, ScalarType::Int, like, true);
    } else if (keep[i].dim() == 3) {
      check_tensor(op, set, keep[i], {batch, heads, "K"}, ScalarType::Long, like);
      check_tensor(op, count, counts[i], {batch, heads}, ScalarType::Int, like, true);
      for (size_t layer = 0; keep.size() == 1 && layer < keys.size(); ++layer)
        if (keys[layer].size(heads_dim) != heads)
          refuse_argument(op, set, " must be (B, K) where layers differ in heads, got ", shape_of(keep[i]));
    } else {
      refuse_argument(op, set, " must be (B, K) or (B, Hk, K), got ", shape_of(keep[i]));
    }
  }
}

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
  return {static_cast<const int64_t*>(keep.const_data_ptr()),
          static_cast<const int32_t*>(counts.const_data_ptr()),
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
  int64_t batch_stride;  // 0 where the block table tells the sequences apart
  int64_t batch, heads;
  int64_t groups;  // of heads; a stream takes the heads of one group
  Record record;   // with all heads
  Places places;   // without a table
  const KeepSet* set;

  int64_t streams() const { return batch * groups; }
  int64_t bytes() const { return batch * heads * set->capacity * record.dims * record.run; }
};

// The dimensions of a cache that hold one position: heads, then head_dim.
Record describe_record(const Tensor& cache, int64_t heads_dim) {
  const int64_t element = static_cast<int64_t>(cache.element_size()), dims = cache.size(3);
  const bool dense = cache.stride(3) == 1 || dims <= 1;
  return {cache.size(heads_dim), cache.stride(heads_dim) * element, dense ? 1 : dims, cache.stride(3) * element,
          dense ? dims * element : element};
}

// How many groups to cut the heads into: single heads where each has its own memory or its own set; where a position's
// heads lie side by side, as many as the threads need.
int64_t head_groups(const Cache& cache, int64_t caches) {
  if (cache.set->per_head || cache.record.head_stride > cache.places.slot_stride) return cache.heads;
  const int64_t wanted = torch::stable::get_num_threads() * kStreamsPerThread;
  const int64_t sequences = std::max<int64_t>(1, caches * cache.batch);
  return std::clamp<int64_t>((wanted + sequences - 1) / sequences, 1, cache.heads);
}

struct Call {
  std::vector<KeepSet> sets;
  std::vector<Cache> caches;
  const Tensor* block_table = nullptr;  // [B, max_blocks]
  const Tensor* seq_lens = nullptr;     // [B]
  bool align_end = false;
};

Stream make_stream(const Call& call, const Cache& cache, const int32_t* table, int64_t table_stride,
                   const int32_t* seq_lens, int64_t seq_lens_stride, int64_t index) {
  const int64_t b = index / cache.groups, group = index % cache.groups;
  const int64_t head = group * cache.heads / cache.groups, end = (group + 1) * cache.heads / cache.groups;
  const KeepSet& set = *cache.set;
  Stream stream{};
  stream.data = cache.data + b * cache.batch_stride + head * cache.record.head_stride;
  stream.record = cache.record;
  stream.record.heads = end - head;
  if (stream.record.dims == 1 && cache.record.head_stride == cache.record.run) {  // heads side by side: one piece
    stream.record.run *= stream.record.heads;
    stream.record.heads = 1;
  }
  stream.places = cache.places;
  if (table) stream.places.table = table + b * table_stride;
  stream.keep = set.keep + b * set.batch_stride + head * set.head_stride;
  const int32_t kept = set.counts[b * set.counts_batch_stride + head * set.counts_head_stride];
  stream.count = std::clamp<int64_t>(kept, 0, set.capacity);
  if (call.align_end) stream.target = (seq_lens ? seq_lens[b * seq_lens_stride] : cache.places.slots) - stream.count;
  stream.backward = call.align_end;
  return stream;
}

void run(const Call& call) {
  std::vector<int64_t> first{0};  // the first stream of each cache, and the end
  int64_t bytes = 0;
  for (const Cache& cache : call.caches) {
    first.push_back(first.back() + cache.streams());
    bytes += cache.bytes();
  }
  const int64_t streams = first.back();
  if (bytes == 0) return;
  const int32_t* table = call.block_table ? static_cast<const int32_t*>(call.block_table->const_data_ptr()) : nullptr;
  const int64_t table_stride = table ? call.block_table->stride(0) : 0;
  const int32_t* seq_lens = call.seq_lens ? static_cast<const int32_t*>(call.seq_lens->const_data_ptr()) : nullptr;
  const int64_t seq_lens_stride = seq_lens ? call.seq_lens->stride(0) : 0;

  share_items(streams, worker_count(streams, bytes / streams, kGrainBytes), [&](int64_t, int64_t begin, int64_t end) {
    size_t c = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t s = begin; s < end; ++s) {
      while (s >= first[c + 1]) ++c;
      compact(make_stream(call, call.caches[c], table, table_stride, seq_lens, seq_lens_stride, s - first[c]));
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
  constexpr const char* op = "compact_kv_";
  check_caches(op, keys, values, {{"B", "Hk", "L", "D"}, 1, 1, false}, keys.data());
  if (keys.empty()) return;
  check_keep(op, keys[0].size(0), keys, 1, keep, counts, keys[0]);
  check_disjoint(op, keys, values, keep, counts);

  Call call{describe_sets(keep, counts), {}, nullptr, nullptr, align_end};
  for (size_t i = 0; i < keys.size(); ++i)
    for (const Tensor* t : {&keys[i], &values[i]}) {
      if (t->numel() == 0) continue;
      const int64_t element = static_cast<int64_t>(t->element_size());
      Cache cache{static_cast<char*>(t->mutable_data_ptr()),
                  t->stride(0) * element,
                  t->size(0),
                  t->size(1),
                  1,
                  describe_record(*t, 1),
                  {nullptr, 1, 1, t->size(2), 0, t->stride(2) * element},
                  &call.sets[keep.size() == 1 ? 0 : i]};
      cache.groups = head_groups(cache, 2 * keys.size());
      call.caches.push_back(cache);
    }
  run(call);
}

void compact_paged_kv_(const Tensors& keys,             // [blocks, slots, Hk, D] each
                       const Tensors& values,           // [blocks, slots, Hk, D] each
                       const Tensor& block_table,       // [B, max_blocks]
                       const Tensors& keep,             // [B, K] or [B, Hk, K]; one, or one per layer
                       const Tensors& counts,           // [B] or [B, Hk]
                       const OptionalTensor& seq_lens,  // [B]
                       bool align_end) {
  constexpr const char* op = "compact_paged_kv_";
  check_caches(op, keys, values, {{"blocks", "slots", "Hk", "D"}, 2, 2, true}, &block_table);
  check_tensor(op, "block_table", block_table, {"B", "max_blocks"}, ScalarType::Int, block_table);
  const int64_t batch = block_table.size(0);
  if (align_end && !seq_lens) refuse_argument(op, "seq_lens", " must be given with align_end");
  if (seq_lens) check_tensor(op, "seq_lens", *seq_lens, {batch}, ScalarType::Int, block_table, true);
  if (keys.empty()) return;
  check_at_least(op, {"keys", 0}, keys[0].size(1), 1);
  check_keep(op, batch, keys, 2, keep, counts, block_table);
  check_disjoint(op, keys, values, keep, counts, &block_table, seq_lens);
  if (block_table.numel() == 0) return;

  Call call{describe_sets(keep, counts), {}, &block_table, seq_lens ? &*seq_lens : nullptr, align_end};
  for (size_t i = 0; i < keys.size(); ++i)
    for (const Tensor* t : {&keys[i], &values[i]}) {
      if (t->numel() == 0) continue;
      const int64_t element = static_cast<int64_t>(t->element_size());
      const int64_t block_stride = t->stride(0) * element, slots = t->size(1);
      Cache cache{static_cast<char*>(t->mutable_data_ptr()),
                  0,
                  batch,
                  t->size(2),
                  1,
                  describe_record(*t, 2),
                  {nullptr, block_table.size(1), t->size(0), slots, block_stride,
                   slots == 1 ? block_stride : t->stride(1) * element},
                  &call.sets[keep.size() == 1 ? 0 : i]};
      cache.groups = head_groups(cache, 2 * keys.size());
      call.caches.push_back(cache);
    }
  run(call);
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) {
  m.impl("compact_kv_", TORCH_BOX(&mustdrop::compact_kv_));
  m.impl("compact_paged_kv_", TORCH_BOX(&mustdrop::compact_paged_kv_));
}
