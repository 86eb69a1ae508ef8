// SPDX-License-Identifier: Apache-2.0
// compact_kv_ and compact_paged_kv_ on CUDA: checks, parameters of all layers, one launch of one of two kernels.
#include "common/launch.h"
#include "compact_kv/checks.h"
#include "compact_kv/chunks.cuh"

namespace mustdrop {
namespace {

// Layers in a kernel's parameters: every driver accepts 4 KiB, CUDA 12.1 and newer accept 32 KiB.
constexpr int kFewLayers = 20;
constexpr int kManyLayers = 160;
static_assert(sizeof(CompactParameters<kFewLayers>) + sizeof(CompactChunks) <= 4096,
              "the older limit on kernel parameters");
static_assert(sizeof(CompactParameters<kManyLayers>) <= 32764, "the limit on kernel parameters");

constexpr int64_t kLeastRun = 64;     // least bytes of a row per block
constexpr int64_t kLeastChunks = 32;  // fewest chunks of a stream: below, zeroing the flags costs too much

struct Plan {
  std::vector<CompactLayer> layers;
  CompactPages pages{};
  int64_t batch = 0, heads = 0, row_bytes = 0;
  int64_t capacity = 0;  // the largest K
  int piece = 16;        // bytes per access
  bool align_end = false;

  void fit_piece(int64_t value) {
    while (value % piece) piece /= 2;
  }
};

CompactCache describe_cache(const Tensor& t, int64_t head_dim, Plan& plan) {
  const int64_t size = t.element_size();
  const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) * size : 0; };
  CompactCache cache{mutable_data<char>(t), stride(0), stride(head_dim), stride(3 - head_dim), size, size,
                     t.size(3) * size};
  if (t.size(3) > 1 && t.stride(3) != 1) {
    cache.element_stride = t.stride(3) * size;
    plan.fit_piece(size);  // elements with gaps: a piece holds at most one
    plan.fit_piece(cache.element_stride);
  }
  for (const int64_t value : {cache.outer_stride, cache.head_stride, cache.slot_stride, cache.row_bytes,
                              static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.base))})
    plan.fit_piece(value);
  plan.row_bytes = std::max(plan.row_bytes, cache.row_bytes);
  return cache;
}

CompactKeep describe_keep(const Tensor& keep, const Tensor& counts) {
  const bool per_head = keep.dim() == 3;
  return {data<int64_t>(keep),           data<int32_t>(counts), keep.size(keep.dim() - 1),      keep.stride(0),
          per_head ? keep.stride(1) : 0, counts.stride(0),      per_head ? counts.stride(1) : 0};
}

Plan describe(const Tensors& keys, const Tensors& values, const Tensors& keep, const Tensors& counts, int64_t head_dim,
              int64_t batch, bool align_end) {
  Plan plan;
  plan.batch = batch;
  plan.align_end = align_end;
  for (size_t i = 0; i < keys.size(); ++i) {
    const size_t set = keep.size() > 1 ? i : 0;
    CompactLayer layer{{describe_cache(keys[i], head_dim, plan), describe_cache(values[i], head_dim, plan)},
                       describe_keep(keep[set], counts[set]),
                       keys[i].size(3 - head_dim),
                       keys[i].size(head_dim)};
    plan.heads = std::max(plan.heads, layer.heads);
    plan.capacity = std::max(plan.capacity, layer.set.capacity);
    plan.layers.push_back(layer);
  }
  return plan;
}

template <int kLayers>
CompactParameters<kLayers> parameters(const Plan& plan, size_t first, size_t layers) {
  CompactParameters<kLayers> p{};
  p.pages = plan.pages;
  p.heads = plan.heads;
  p.align_end = plan.align_end;
  std::copy_n(plan.layers.begin() + first, layers, p.layers);
  return p;
}

int64_t streams_of(const Plan& plan, size_t layers) {
  return static_cast<int64_t>(2 * layers) * plan.batch * plan.heads;
}

// The power of two of columns that covers a row, up to the threads of a block.
int32_t columns_of(int64_t pieces) {
  int32_t columns = 1;
  while (columns < kCompactThreads && columns < pieces) columns *= 2;
  return columns;
}

template <class Piece, int kLayers>
void launch_compact(const Device& device, const Plan& plan, size_t first) {
  const size_t layers = std::min<size_t>(kLayers, plan.layers.size() - first);
  CompactParameters<kLayers> p = parameters<kLayers>(plan, first, layers);

  // Too few streams for the device: fewer columns per block, down to runs of kLeastRun bytes.
  const int64_t pieces = ceil_div(plan.row_bytes, sizeof(Piece)), streams = streams_of(plan, layers);
  p.columns = columns_of(pieces);
  while (streams * ceil_div(pieces, p.columns) < 4 * device.facts().multiprocessors &&
         p.columns * int64_t(sizeof(Piece)) > kLeastRun)
    p.columns /= 2;
  p.splits = static_cast<int32_t>(ceil_div(pieces, p.columns));
  const Grid grid{dim3(blocks(plan.batch * plan.heads * p.splits), 2, static_cast<unsigned>(layers)), kCompactThreads,
                  kCompactChunk * sizeof(CompactMove)};
  device.launch(grid, MUSTDROP_KERNEL(compact_kernel<Piece, kLayers>), p);
}

// Whether one block per stream, split into the shortest runs, would leave half of the device idle.
bool leaves_idle(const Device& device, const Plan& plan) {
  const int64_t runs = streams_of(plan, plan.layers.size()) * ceil_div(plan.row_bytes, kLeastRun);
  return plan.layers.size() <= kFewLayers && 2 * runs <= device.facts().multiprocessors;
}

// Launches a block per chunk of moves. Returns false, without a launch, if the streams are too short.
template <class Piece>
bool launch_chunks(const Device& device, const Plan& plan, const Tensor& like) {
  const int64_t pieces = ceil_div(plan.row_bytes, sizeof(Piece));
  CompactParameters<kFewLayers> p = parameters<kFewLayers>(plan, 0, plan.layers.size());
  p.columns = columns_of(pieces);
  p.splits = static_cast<int32_t>(ceil_div(pieces, p.columns));
  CompactChunks c{};
  c.batch = plan.batch;
  c.streams = streams_of(plan, plan.layers.size()) * p.splits;
  c.moves = compact_chunk_moves(p.columns);
  c.chunks = ceil_div(plan.capacity, c.moves);
  if (c.chunks < kLeastChunks) return false;
  const Tensor zeros = new_zeros(like, {1 + c.streams * c.chunks}, ScalarType::Int);
  c.ticket = mutable_data<int32_t>(zeros);
  c.read = c.ticket + 1;
  const Grid grid{dim3(blocks(c.streams * c.chunks)), kCompactThreads,
                  static_cast<size_t>(compact_chunk_bytes<Piece>(c.moves))};
  device.launch(grid, MUSTDROP_KERNEL(compact_chunks_kernel<Piece, kFewLayers>), p, c);
  return true;
}

template <class Piece>
void launch_all(const Device& device, const Plan& plan, const Tensor& like) {
  if (leaves_idle(device, plan) && launch_chunks<Piece>(device, plan, like)) return;
  if (plan.layers.size() <= kFewLayers) return launch_compact<Piece, kFewLayers>(device, plan, 0);
  for (size_t first = 0; first < plan.layers.size(); first += kManyLayers)
    launch_compact<Piece, kManyLayers>(device, plan, first);
}

void run(const Device& device, const Plan& plan, const Tensor& like) {
  if (plan.batch * plan.heads * plan.row_bytes == 0) return;
  switch (plan.piece) {
    case 16:
      return launch_all<uint4>(device, plan, like);
    case 8:
      return launch_all<uint2>(device, plan, like);
    case 4:
      return launch_all<uint32_t>(device, plan, like);
    case 2:
      return launch_all<uint16_t>(device, plan, like);
    default:
      return launch_all<uint8_t>(device, plan, like);
  }
}

void compact_kv_(const Tensors keys,    // [B, Hk, L, D] each
                 const Tensors values,  // [B, Hk, L, D] each
                 const Tensors keep,    // [B, K] or [B, Hk, K]; one, or one per layer
                 const Tensors counts,  // [B] or [B, Hk]
                 bool align_end) {
  check_compact_kv(keys, values, keep, counts);
  if (keys.empty()) return;
  const Device device(keys[0]);
  run(device, describe(keys, values, keep, counts, 1, keys[0].size(0), align_end), keys[0]);
}

void compact_paged_kv_(const Tensors keys,              // [blocks, page_size, Hk, D] each
                       const Tensors values,            // [blocks, page_size, Hk, D] each
                       const Tensor& block_table,       // [B, max_blocks]
                       const Tensors keep,              // [B, K] or [B, Hk, K]; one, or one per layer
                       const Tensors counts,            // [B] or [B, Hk]
                       const OptionalTensor& seq_lens,  // [B]
                       bool align_end) {
  check_compact_paged_kv(keys, values, block_table, keep, counts, seq_lens, align_end);
  if (keys.empty()) return;
  const Device device(block_table);
  Plan plan = describe(keys, values, keep, counts, 2, block_table.size(0), align_end);
  plan.pages = {data<int32_t>(block_table),
                seq_lens ? data<int32_t>(*seq_lens) : nullptr,
                block_table.stride(0),
                seq_lens ? seq_lens->stride(0) : 0,
                block_table.size(1),
                keys[0].size(1),
                keys[0].size(0)};
  if (plan.pages.max_blocks == 0 || plan.pages.blocks == 0) return;
  run(device, plan, keys[0]);
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("compact_kv_", TORCH_BOX(&mustdrop::compact_kv_));
  m.impl("compact_paged_kv_", TORCH_BOX(&mustdrop::compact_paged_kv_));
}
