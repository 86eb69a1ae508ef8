// SPDX-License-Identifier: Apache-2.0
// In place, for every layer, cache (keys, values), sequence b and head h: slot to(i) takes what slot keep[i] held, i < n,
// n = clamp(counts, 0, K); to(i) = i, or end - n + i with align_end. A move that leaves the tensors is skipped.
//
// Why it is race-free. keep ascends, so keep[i] >= i, and slot i is the source of moves m <= i alone: written in order, a
// store of tile t can only overwrite sources of tiles <= t. So one barrier between the loads of a tile and its stores is
// enough, and later tiles may be loaded at any time: tiles t and t + 1 share a barrier, and t + 2 is loaded while they are
// stored. With align_end all of it is mirrored and the moves are made last to first. 16-byte columns of a row are independent
// of each other: few heads are split by columns over several blocks, which then never wait for one another, however long the
// sequence is. A `keep` that does not ascend breaks the order, so that what ends up in the slots is unspecified; nothing
// outside the tensors is touched then either, since each move is checked by itself.
//
// A block owns one stream: (layer, cache, b, h, a range of columns). Each thread keeps to one column. A few long streams are
// moved by the kernel of chunks.cuh.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kCompactThreads = 256;
constexpr int kCompactChunk = 1024;  // moves that are looked up together
constexpr int kCompactUnroll = 4;    // pieces that a thread has under way, twice

struct CompactCache {
  char* base;            // [B, Hk, L, row bytes], or [blocks, slots, Hk, row bytes]
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
  int64_t keep_batch_stride, keep_head_stride, count_batch_stride, count_head_stride;  // 0 where heads share a set
};

struct CompactLayer {
  CompactCache cache[2];  // keys, values
  CompactKeep set;
  int64_t length;  // L of a dense cache
  int64_t heads;
};

struct CompactPages {
  const int32_t* block_table;  // [B, max_blocks]; null for dense caches
  const int32_t* seq_lens;     // [B], where align_end ends; null without
  int64_t table_stride, seq_stride, max_blocks, slots, blocks;
};

template <int kLayers>
struct CompactParameters {
  CompactPages pages;
  int64_t heads;    // the most that a layer has
  int32_t columns;  // threads side by side, a power of two
  int32_t splits;   // ranges of columns
  bool align_end;
  CompactLayer layers[kLayers];
};

// Byte offsets within one head's cache; from < 0: nothing to do.
struct CompactMove {
  int64_t from, to;
};

struct CompactStream {
  const int64_t* keep;  // [n]
  int64_t b, n, extent, end;
};

// Byte offset of a position, -1 where it is in no block of the table.
__device__ __forceinline__ int64_t compact_offset(const CompactPages& pages, const CompactCache& cache, int64_t b,
                                                  int64_t position) {
  if (!pages.block_table) return position * cache.slot_stride;
  const int64_t block = pages.block_table[b * pages.table_stride + position / pages.slots];
  if (block < 0 || block >= pages.blocks) return -1;
  return block * cache.outer_stride + position % pages.slots * cache.slot_stride;
}

// The entry of keep that a step is about, and the position that it goes to.
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

// A thread's part of a chunk of moves: rows first, first + step, ...
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
  s.extent = p.pages.block_table ? p.pages.max_blocks * p.pages.slots : layer.length;
  s.end = p.pages.seq_lens ? p.pages.seq_lens[b * p.pages.seq_stride] : layer.length;
  return s;
}

// Where this thread's column of a range of columns is at offset 0, and its rows but for `moves`.
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

// Makes up to kCompactChunk moves that have been looked up. Every thread of the block takes part.
template <class Piece>
__device__ __forceinline__ void compact_chunk(const CompactMove* moves, char* column, const CompactRows& rows) {
  Piece even[kCompactUnroll] = {}, odd[kCompactUnroll] = {};
  const int tiles = static_cast<int>(ceil_div(rows.moves, kCompactUnroll * rows.step));
  compact_load(even, moves, column, rows, 0);
  for (int tile = 0; tile < tiles; tile += 2) {
    compact_load(odd, moves, column, rows, tile + 1);
    __syncthreads();  // all loads of `tile` and `tile + 1` are done
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
    __syncthreads();  // the last chunk's moves are no longer read
    for (int i = threadIdx.x; i < rows.moves; i += kCompactThreads)
      moves[i] = compact_move(p.pages, cache, s, p.align_end, begin + i);
    __syncthreads();
    compact_chunk<Piece>(moves, column, rows);
  }
}

}  // namespace mustdrop
