// SPDX-License-Identifier: Apache-2.0
// s[key, row] = sum over d of k[key, d] q[row, d] for a tile of 64 M keys and up to 128 query rows of one head.
//
// Keys are the M dimension of the matrix instruction and rows its N dimension, so rows are padded to 16 only. The head
// dimension is split into slabs of 128 bytes a row, prefetched into a ring in shared memory; a row's eight 16-byte
// pieces are swizzled by the row's number, so neither ldmatrix nor 16-byte loads have bank conflicts. float32 is
// multiplied by fused multiply-adds, with the same mapping of results to threads.
//
// Warp w has the 16 M keys from 16 M (w % 4) on and every second group of 16 rows, beginning with group w / 4, so few
// rows still occupy all warps. In a warp lane 4 g + t has keys g and g + 8 of each 16 and rows 2 t, 2 t + 1 of each
// eight. M = 2 halves the reads of the rows from L2 and from shared memory, and occupies a multiprocessor with one
// block.
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
template <int M>
constexpr int kScorePitch = kTileKeys<M> + 8;  // floats of a row where a tile of results is exchanged

template <class T>
constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T));  // elements

// Blocks per multiprocessor. With fused multiply-adds one block saturates it, and uses more than half of its registers.
template <class T, int M>
constexpr int kResident = M > 1 || sizeof(T) == sizeof(float) ? 1 : 2;

// A block's operands, at the start of its dynamic shared memory; a tile's results overwrite them.
template <int M>
struct TileShared {
  char keys[kKeySlots][kTileKeys<M> * kSlabBytes];
  char rows[kStages][kTileRows * kSlabBytes];
};
static_assert(sizeof(TileShared<1>) >= sizeof(float) * kTileRows * kScorePitch<1>, "the results have room");
static_assert(sizeof(TileShared<2>) >= sizeof(float) * kTileRows * kScorePitch<2>, "the results have room");

template <int M>  // fragments of multiply_add_16x8x16: [16 keys][eight rows][key half * 2 + row]
using TileScores = float[M][kEights][4];

__device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece) {  // offset in bytes within the slab
  return row * kSlabBytes + ((piece ^ (row & 7u)) * 16);
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

// ---------------------------------------------------------------------------------------------- copies

// Starts the copy of one slab of the first `count` rows; zeros past `dim` and for rows with a negative offset. Visible
// to the block after copies_wait and a barrier.
template <class T, class Offset>
__device__ __forceinline__ void stage_slab(char* to,       // [count, kSlabBytes] in shared memory
                                           const T* from,  // first element of the head
                                           const Offset& offset_of, int count, int32_t dim, int64_t dim_stride,
                                           bool vector, int32_t slab) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int32_t d = slab * kSlab<T> + piece * kVector;
  if (piece / 2 * 2 * kVector >= dim - slab * kSlab<T>) return;  // steps of 32 bytes that the product skips
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kPieces; row < count; row += kScoreThreads / kPieces) {
    char* at = to + piece_at(row, piece);
    const int64_t offset = offset_of(row);
    if (vector) {
      const bool valid = offset >= 0 && d < dim;
      copy16_async(at, valid ? from + offset + d : from, valid);
    } else {
      Pack<T, kVector> pack;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        pack.at[i] = offset >= 0 && d + i < dim ? from[offset + (d + i) * dim_stride] : T{};
      store_pack(reinterpret_cast<T*>(at), pack);
    }
  }
}

// Calls stage(slot) and use(slot) once for each of `units` units, stage() ahead of use(), with the same slot for the
// same unit. Called by the whole block; a barrier precedes each use() and follows the last.
template <class Stage, class Use>
__device__ __forceinline__ void run_units(int units, const Stage& stage, const Use& use) {
#pragma unroll
  for (int unit = 0; unit < kStages - 1; ++unit) {
    if (unit < units) stage(unit);
    copies_commit();
  }
  int slot = 0, free = kStages - 1;
  for (int unit = 0; unit < units; ++unit) {
    copies_wait<kStages - 2>();
    __syncthreads();  // this unit's copies are complete, and the previous unit is no longer in use
    if (unit + kStages - 1 < units) stage(free);
    copies_commit();
    use(slot);
    free = slot;
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  copies_wait<0>();
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------- products

// scores += keys rows^T over one slab with `depth` elements (then zeros up to the next 32 bytes).
template <class T, int M>
struct TileProduct {
  static __device__ __forceinline__ void add(const char* keys,  // [kTileKeys, kSlabBytes]
                                             const char* rows,  // [kTileRows, kSlabBytes]
                                             int32_t depth, int groups, TileScores<M>& scores) {
    const unsigned lane = lane_id();
    const uint32_t row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kPieces / 2; ++step) {
      if (step * 16 >= depth) break;
      uint32_t a[M][4];
#pragma unroll
      for (int block = 0; block < M; ++block)
        load_matrices(a[block], keys + piece_at(warp_key<M>(block) + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group >= groups) break;
        uint32_t b[4];
        load_matrices(b, rows + piece_at(group_row(group) + row, 2 * step + lane / 8 % 2));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int block = 0; block < M; ++block) {
          multiply_add_16x8x16<T>(scores[block][2 * group], a[block], low);
          multiply_add_16x8x16<T>(scores[block][2 * group + 1], a[block], high);
        }
      }
    }
  }
};

template <>
struct TileProduct<float, 1> {
  static __device__ __forceinline__ void add(const char* keys,  // [kTileKeys, kSlabBytes]
                                             const char* rows,  // [kTileRows, kSlabBytes]
                                             int32_t depth, int groups, TileScores<1>& scores) {
    // Rows of different eights differ by multiples of 8, so they share their swizzle.
    const auto load = [](const char* slab, uint32_t row, uint32_t piece) {
      return load_pack<float, 4>(reinterpret_cast<const float*>(slab + piece_at(row, piece)));
    };
    const uint32_t first_row = lane_row(0), first_key = lane_key<1>(0);
#pragma unroll 1
    for (int piece = 0; piece * 4 < depth; ++piece) {
      const Pack<float, 4> key[2] = {load(keys, first_key, piece), load(keys, first_key + 8, piece)};
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        if (eight / 2 >= groups) break;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Pack<float, 4> row = load(rows + (eight / 2 * 32 + eight % 2 * 8) * kSlabBytes, first_row + r, piece);
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int d = 0; d < 4; ++d) {
              float& score = scores[0][eight][2 * half + r];
              score = fmaf(key[half].at[d], row.at[d], score);
            }
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ int32_t slabs_of(int32_t dim) {
  return dim > kSlab<T> ? (dim + kSlab<T> - 1) / kSlab<T> : 1;
}

// Elements of slab `slab` inside the head dimension.
template <class T>
__device__ __forceinline__ int32_t slab_depth(int32_t dim, int32_t slab) {
  const int32_t left = dim - slab * kSlab<T>;
  return left < kSlab<T> ? left : kSlab<T>;
}

}  // namespace mustdrop
