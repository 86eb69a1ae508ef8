// SPDX-License-Identifier: Apache-2.0
// A tile of 64 M keys and up to 128 query rows of one head: its operands in shared memory, and their distribution over
// threads.
//
// Keys are the M dimension of the matrix instruction and rows its N dimension, so rows are padded to 16 only. The head
// dimension is split into slabs of 128 bytes a row, prefetched into a ring in shared memory; a row's eight 16-byte
// pieces are swizzled by the row's number, so neither ldmatrix nor 16-byte loads have bank conflicts.
//
// Warp w has the 16 M keys from 16 M (w % 4) on and every second group of 16 rows, beginning with group w / 4, so few
// rows still occupy all warps. In a warp lane 4 g + t has keys g and g + 8 of each 16 and rows 2 t, 2 t + 1 of each
// eight. M = 2 halves the reads of the rows from L2 and from shared memory. One block occupies a multiprocessor: its
// threads have all registers, so operands are loaded ahead of the products that need them.
#pragma once

#include "attention_scores/rows.cuh"

namespace mustdrop {

template <int M>
constexpr int kTileKeys = 64 * M;
constexpr int kSlabBytes = 128;  // of a row
constexpr int kPieces = kSlabBytes / 16;
constexpr int kStages = 3;    // slabs in flight, the one in use included
constexpr int kKeySlots = 4;  // slabs of keys in shared memory: a ring of kStages, or all slabs of two heads
constexpr int kGroups = 4;    // groups of 16 rows of a warp
constexpr int kEights = 2 * kGroups;

template <class T>
constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));  // elements

// A block's operands; a tile's results overwrite them.
template <int M>
struct TileShared {
  char keys[kKeySlots][kTileKeys<M> * kSlabBytes];
  char rows[kStages][kTileRows * kSlabBytes];
};

template <int M>  // fragments of multiply_add_16x8x16: [16 keys][eight rows][key half * 2 + row]
using TileScores = float[M][kEights][4];

__device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece) {  // offset in bytes within the slab
  return row * kSlabBytes + ((piece ^ (row & 7u)) * 16);
}

template <class T>
__device__ __forceinline__ int32_t slabs_of(int32_t dim) {
  return dim > kSlab<T> ? (dim + kSlab<T> - 1) / kSlab<T> : 1;
}

// ---------------------------------------------------------------------------------------------- ownership

template <int M>
__device__ __forceinline__ int warp_key(int block) {  // the first of 16
  return (static_cast<int>(warp_id() % 4) * M + block) * 16;
}
template <int M>
__device__ __forceinline__ int lane_key(int block) {  // and this + 8
  return warp_key<M>(block) + static_cast<int>(lane_id() / 4);
}
__device__ __forceinline__ int group_row(int group) { return 16 * (2 * group + static_cast<int>(warp_id() / 4)); }
__device__ __forceinline__ int lane_row(int eight) {  // and this + 1
  return group_row(eight / 2) + 8 * (eight % 2) + 2 * static_cast<int>(lane_id() % 4);
}
__device__ __forceinline__ int warp_groups(int32_t rows) {  // of 16 rows with at least one of the first `rows`
  return ((rows + 15) / 16 + 1 - static_cast<int>(warp_id() / 4)) / 2;
}

// Calls f(score, row, key) for each of a thread's scores.
template <int M, class Scores, class F>
__device__ __forceinline__ void each_score(Scores& scores, const F& f) {
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
    for (int block = 0; block < M; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(scores[block][eight][i], lane_row(eight) + i % 2, lane_key<M>(block) + i / 2 * 8);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<groups>{}), so that loops over a warp's groups of rows are unrolled without a condition. All threads
// of a warp agree on `groups`.
template <class F>
__device__ __forceinline__ void with_groups(int groups, const F& f) {
  if (groups > 2) return groups == 4 ? f(Constant<4>{}) : f(Constant<3>{});
  if (groups == 2) return f(Constant<2>{});
  if (groups == 1) return f(Constant<1>{});
}

}  // namespace mustdrop
