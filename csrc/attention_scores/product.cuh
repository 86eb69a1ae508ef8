// SPDX-License-Identifier: Apache-2.0
// scores[key, row] += sum over the elements d of a slab of k[key, d] q[row, d], for a warp's keys and kCount groups of
// 16 rows.
//
// 16-bit types use matrix instructions, whose operands are loaded one step of 16 elements ahead. float32 is multiplied
// by fused multiply-adds, with the same distribution of results over threads.
#pragma once

#include "attention_scores/tile.cuh"

namespace mustdrop {

template <class T, int M>
struct TileProduct {
  template <int kCount>
  struct Operands {  // of one step
    uint32_t a[M][4], b[kCount][4];
  };

  template <int kCount>
  static __device__ __forceinline__ void load(Operands<kCount>& to, const char* keys, const char* rows, int step) {
    // A step is 32 bytes of a row; the swizzle acts on the lower bits alone, so the step is a constant bit pattern.
    const uint32_t lane = lane_id(), low = lane % 8 + lane / 16 * 8;
    const uint32_t key = piece_at(warp_key<M>(0) + lane % 16, lane / 16) ^ (step * 32);
    const uint32_t row = piece_at(group_row(0) + low, lane / 8 % 2) ^ (step * 32);
#pragma unroll
    for (int block = 0; block < M; ++block) load_matrices(to.a[block], keys + key + block * 16 * kSlabBytes);
#pragma unroll
    for (int group = 0; group < kCount; ++group) load_matrices(to.b[group], rows + row + group * 32 * kSlabBytes);
  }

  template <int kCount>
  static __device__ __forceinline__ void multiply(const Operands<kCount>& by, TileScores<M>& scores) {
#pragma unroll
    for (int group = 0; group < kCount; ++group) {
      const uint32_t low[2] = {by.b[group][0], by.b[group][1]}, high[2] = {by.b[group][2], by.b[group][3]};
#pragma unroll
      for (int block = 0; block < M; ++block) {
        multiply_add_16x8x16<T>(scores[block][2 * group], by.a[block], low);
        multiply_add_16x8x16<T>(scores[block][2 * group + 1], by.a[block], high);
      }
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void add(const char* keys,  // [kTileKeys, kSlabBytes]
                                             const char* rows,  // [kTileRows, kSlabBytes]
                                             int32_t depth,     // elements from this slab on
                                             TileScores<M>& scores) {
    constexpr int kSteps = kPieces / 2;
    Operands<kCount> operands[2];
    if (depth >= kSlab<T>) {
      load(operands[0], keys, rows, 0);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) load(operands[(step + 1) % 2], keys, rows, step + 1);
        multiply(operands[step % 2], scores);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step * 16 < depth; ++step) {
        load(operands[0], keys, rows, step);
        multiply(operands[0], scores);
      }
    }
  }
};

template <>
struct TileProduct<float, 1> {
  template <int kCount>
  static __device__ __forceinline__ void add(const char* keys,  // [kTileKeys, kSlabBytes]
                                             const char* rows,  // [kTileRows, kSlabBytes]
                                             int32_t depth,     // elements from this slab on
                                             TileScores<1>& scores) {
    // Rows of different eights differ by multiples of 8, so they share their swizzle.
    const auto load = [](const char* slab, uint32_t row, uint32_t piece) {
      return load_pack<float, 4>(reinterpret_cast<const float*>(slab + piece_at(row, piece)));
    };
    const uint32_t first_row = lane_row(0), first_key = lane_key<1>(0);
    const int pieces = depth < kSlab<float> ? (depth + 3) / 4 : kPieces;
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      const Pack<float, 4> key[2] = {load(keys, first_key, piece), load(keys, first_key + 8, piece)};
#pragma unroll
      for (int eight = 0; eight < 2 * kCount; ++eight)
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
};

}  // namespace mustdrop
