// SPDX-License-Identifier: Apache-2.0
// In-place compaction. For every layer, cache (keys, values), sequence b and head h: slot to(i) = slot keep[i], i < n,
// n = clamp(counts, 0, K); to(i) = i, or end - n + i with align_end. Moves from or to outside the tensors are skipped.
//
// Race freedom: keep ascends, so keep[i] >= i, and slot i is the source only of moves m <= i. With stores in order, a
// store of tile t can only overwrite sources of tiles <= t. So one barrier between the loads and the stores of a tile
// suffices, and later tiles may be loaded at any time: tiles t and t + 1 share a barrier, and t + 2 is loaded while
// they are stored. align_end mirrors this and makes the moves last to first. The 16-byte columns of a row are
// independent: few heads are split by columns over several blocks, which never wait for each other. If `keep` does not
// ascend, the contents of the slots are unspecified; each move is checked by itself, so nothing outside the tensors is
// accessed.
//
// A block processes one stream: (layer, cache, b, h, a range of columns); each thread processes one column. The kernel
// of chunks.cuh is for few long streams.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kCompactThreads = 256;
constexpr int kCompactChunk = 1024;  // moves whose offsets are computed together
constexpr int kCompactUnroll = 4;    // pieces in flight per thread, twice

struct CompactCache {
  char* base;            // [B, Hk, L, row bytes], or [blocks, page_size, Hk, row bytes]
  int64_t outer_stride;  // of a sequence, or of a block; all strides in bytes
  int64_t head_stride;
  int64_t slot_stride;
  int64_t element_stride;  // of the last dimension
  int64_t element_size;    // bytes
  int64_t row_bytes;       // packed
};

struct CompactKeep {
  const int64_t* keep;                                                                 // [B, K] or [B, Hk, K]
  const int32_t* counts;                                                               // [B] or [B, Hk]
  int64_t capacity;                                                                    // K
  int64_t keep_batch_stride, keep_head_stride, count_batch_stride, count_head_stride;  // 0 if heads share a set
};

struct CompactLayer {
  CompactCache cache[2];  // keys, values
  CompactKeep set;
  int64_t length;  // L of a dense cache
  int64_t heads;
};

struct CompactPages {
  const int32_t* block_table;  // [B, max_blocks]; null for dense caches
  const int32_t* seq_lens;     // [B], end of align_end; null without
  int64_t table_stride, seq_stride, max_blocks, page_size, blocks;
};

template <int kLayers>
struct CompactParameters {
  CompactPages pages;
  int64_t heads;    // maximum over the layers
  int32_t columns;  // threads side by side, a power of two
  int32_t splits;   // ranges of columns
  bool align_end;
  CompactLayer layers[kLayers];
};

// Byte offsets within one head's cache; from < 0: no move.
struct CompactMove {
  int64_t from, to;
};

struct CompactStream {
  const int64_t* keep;  // [n]
  int64_t b, n, extent, end;
};

// Byte offset of a position, -1 if the table has no block for it.
__device__ __forceinline__ int64_t compact_offset(const CompactPages& pages, const CompactCache& cache, int64_t b,
                                                  int64_t position) {
  if (!pages.block_table) return position * cache.slot_stride;
  const int64_t block = pages.block_table[b * pages.table_stride + position / pages.page_size];
  if (block < 0 || block >= pages.blocks) return -1;
  return block * cache.outer_stride + position % pages.page_size * cache.slot_stride;
}

// The entry of keep for a step, and the target position of an entry.
__device__ __forceinline__ int64_t compact_entry(const CompactStream& s, bool align_end, int64_t step) {
  return align_end ? s.n - 1 - step : step;
}
__device__ __forceinline__ int64_t compact_target(const CompactStream& s, bool align_end, int64_t entry) {
  return align_end ? s.end - s.n + entry : entry;
}

__device__ __forceinline__ CompactMove compact_move(const CompactPages& pages, const CompactCache& cache,
                                                    const CompactStream& s, bool align_end, int64_t step) {
  const int64_t entry = compact_entry(s, align_end, step);
  const int64_t source = s.keep[entry], target = compact_target(s, align_end, entry);
  if (source == target || source < 0 || source >= s.extent || target < 0 || target >= s.extent) return {-1, -1};
  const int64_t from = compact_offset(pages, cache, s.b, source), to = compact_offset(pages, cache, s.b, target);
  return from < 0 || to < 0 ? CompactMove{-1, -1} : CompactMove{from, to};
}

// A thread's rows of a chunk of moves: first, first + step, ...
struct CompactRows {
  int first, step, moves;
  bool active;
};

// Head h of sequence b.
template <int kLayers>
__device__ __forceinline__ CompactStream compact_stream(const CompactParameters<kLayers>& p, const CompactLayer& layer,
                                                        int64_t b, int64_t h) {
  const CompactKeep& set = layer.set;
  CompactStream s;
  s.b = b;
  s.keep = set.keep + b * set.keep_batch_stride + h * set.keep_head_stride;
  s.n = clamp_to(set.counts[b * set.count_batch_stride + h * set.count_head_stride], 0, set.capacity);
  s.extent = p.pages.block_table ? p.pages.max_blocks * p.pages.page_size : layer.length;
  s.end = p.pages.seq_lens ? p.pages.seq_lens[b * p.pages.seq_stride] : layer.length;
  return s;
}

// Address of this thread's column at offset 0; sets `rows` but for `moves`.
template <class Piece, int kLayers>
__device__ __forceinline__ char* compact_column(const CompactParameters<kLayers>& p, const CompactCache& cache,
                                                int64_t b, int64_t h, int64_t split, CompactRows& rows) {
  const int64_t byte = (split * p.columns + threadIdx.x % p.columns) * int64_t(sizeof(Piece));  // of the packed row
  rows.first = static_cast<int>(threadIdx.x) / p.columns;
  rows.step = kCompactThreads / p.columns;
  rows.active = byte < cache.row_bytes;
  char* column = cache.base + h * cache.head_stride + (p.pages.block_table ? 0 : b * cache.outer_stride);
  if (rows.active) column += byte / cache.element_size * cache.element_stride + byte % cache.element_size;
  return column;
}

template <class Piece>
__device__ __forceinline__ void compact_load(Piece (&held)[kCompactUnroll], const CompactMove* moves,
                                             const char* column, const CompactRows& rows, int tile) {
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u) {
    const int row = rows.first + (tile * kCompactUnroll + u) * rows.step;
    if (!rows.active || row >= rows.moves) continue;
    const int64_t from = moves[row].from;
    if (from >= 0) held[u] = *reinterpret_cast<const Piece*>(column + from);
  }
}

template <class Piece>
__device__ __forceinline__ void compact_store(const Piece (&held)[kCompactUnroll], const CompactMove* moves,
                                              char* column, const CompactRows& rows, int tile) {
#pragma unroll
  for (int u = 0; u < kCompactUnroll; ++u) {
    const int row = rows.first + (tile * kCompactUnroll + u) * rows.step;
    if (!rows.active || row >= rows.moves) continue;
    const CompactMove move = moves[row];
    if (move.from >= 0) *reinterpret_cast<Piece*>(column + move.to) = held[u];
  }
}

// Executes up to kCompactChunk moves. Called by the whole block.
template <class Piece>
__device__ __forceinline__ void compact_chunk(const CompactMove* moves, char* column, const CompactRows& rows) {
  Piece even[kCompactUnroll] = {}, odd[kCompactUnroll] = {};
  const int tiles = static_cast<int>(ceil_div(rows.moves, kCompactUnroll * rows.step));
  compact_load(even, moves, column, rows, 0);
  for (int tile = 0; tile < tiles; tile += 2) {
    compact_load(odd, moves, column, rows, tile + 1);
    __syncthreads();  // the loads of `tile` and `tile + 1` are complete
    compact_store(even, moves, column, rows, tile);
    compact_load(even, moves, column, rows, tile + 2);
    compact_store(odd, moves, column, rows, tile + 1);
  }
}

template <class Piece, int kLayers>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const __grid_constant__ CompactParameters<kLayers> p) {
  MUSTDROP_SHARED_MEMORY(shared);
  CompactMove* moves = reinterpret_cast<CompactMove*>(shared);  // [kCompactChunk]
  const CompactLayer& layer = p.layers[blockIdx.z];
  const CompactCache& cache = layer.cache[blockIdx.y];
  const int64_t split = blockIdx.x % p.splits, h = blockIdx.x / p.splits % p.heads, b = blockIdx.x / p.splits / p.heads;
  if (h >= layer.heads) return;

  const CompactStream s = compact_stream(p, layer, b, h);
  CompactRows rows;
  char* column = compact_column<Piece>(p, cache, b, h, split, rows);

  for (int64_t begin = 0; begin < s.n; begin += kCompactChunk) {
    rows.moves = static_cast<int>(s.n - begin < kCompactChunk ? s.n - begin : kCompactChunk);
    __syncthreads();  // the previous chunk's moves are no longer read
    for (int i = threadIdx.x; i < rows.moves; i += kCompactThreads)
      moves[i] = compact_move(p.pages, cache, s, p.align_end, begin + i);
    __syncthreads();
    compact_chunk<Piece>(moves, column, rows);
  }
}

}  // namespace mustdrop
