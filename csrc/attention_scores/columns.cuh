// SPDX-License-Identifier: Apache-2.0
// total and peak of the keys of a tile: the sum and the maximum of each key's head means over the query rows.
//
// If a block has all heads, its sums are in registers and it reduces them there. Otherwise the blocks that share a tile
// exchange their sums in shared memory, and each reduces its own share of the keys.
#pragma once

#include "attention_scores/slabs.cuh"

namespace mustdrop {

constexpr int kScoreCluster = kMostCluster;  // blocks that share a tile at most
template <int M>
constexpr int kScorePitch = kTileKeys<M> + 4;  // floats of a row of exchanged sums; without bank conflicts
static_assert(sizeof(TileShared<1>) >= sizeof(float) * kTileRows * kScorePitch<1>, "the results have room");
static_assert(sizeof(TileShared<2>) >= sizeof(float) * kTileRows * kScorePitch<2>, "the results have room");

template <int M>
constexpr int kTileBits = M == 1 ? 6 : 7;  // log2 of its keys
static_assert(1 << kTileBits<1> == kTileKeys<1> && 1 << kTileBits<2> == kTileKeys<2>);

struct KeyTile {
  int32_t first;            // position of its first key
  int32_t lowest, highest;  // positions of its first and last vision token; lowest > highest: there is none
};

template <int M>
struct ColumnsShared {
  alignas(16) float total[kScoreWarps][kTileKeys<M>];  // over the rows of a warp
  alignas(16) float peak[kScoreWarps][kTileKeys<M>];
  // A bit a key, from each warp: a later sequence writes the same result.
  uint32_t taken[kTileKeys<M> / kWarp][kScoreWarps];
};

// Mask of the keys among the 32 from `first` on of sequence b that a later sequence overwrites; of this warp's share of
// the later sequences.
__device__ __forceinline__ uint32_t taken_later(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t first) {
  uint32_t taken = 0;
  for (int32_t other = b + 1 + static_cast<int32_t>(threadIdx.x); other < p.batch; other += kScoreThreads) {
    const Span span = span_at(p.cu_k, other, p.keys, p.max_keys);
    const int64_t offset = span.begin - (s.out + first);
    const int64_t begin = clamp_to(offset, 0, 32), end = clamp_to(offset + span.length, 0, 32);
    if (begin < end) taken |= ~0u >> (32 - (end - begin)) << begin;
  }
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) taken |= __shfl_xor_sync(kFullMask, taken, delta);
  return taken;
}

// Called by the whole block; a barrier must follow.
template <int M>
__device__ __forceinline__ void clear_columns(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t first,
                                              ColumnsShared<M>& columns) {
  for (int i = threadIdx.x; i < kScoreWarps * kTileKeys<M>; i += kScoreThreads)
    columns.total[i / kTileKeys<M>][i % kTileKeys<M>] = columns.peak[i / kTileKeys<M>][i % kTileKeys<M>] = 0.0f;
  if (!p.cu_k) return;
  for (int word = 0; word < kTileKeys<M> / static_cast<int>(kWarp); ++word) {
    const uint32_t taken = taken_later(p, s, b, first + 32 * word);
    if (lane_id() == 0) columns.taken[word][warp_id()] = taken;
  }
}

// ---------------------------------------------------------------------------------------------- all heads in registers

// Adds the sums of all heads of a tile of rows. The lanes of a warp with the same keys have different rows.
template <int M>
__device__ __forceinline__ void add_columns(float head_share, const TileScores<M>& sums, int32_t count,
                                            ColumnsShared<M>& columns) {
#pragma unroll
  for (int block = 0; block < M; ++block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = 0.0f, peak = 0.0f;
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float mean = lane_row(eight) + r < count ? sums[block][eight][2 * half + r] * head_share : 0.0f;
          total += mean;
          peak = max_nan(peak, mean);
        }
#pragma unroll
      for (int delta = 1; delta < 4; delta *= 2) {
        total += __shfl_xor_sync(kFullMask, total, delta);
        peak = max_nan(peak, __shfl_xor_sync(kFullMask, peak, delta));
      }
      const int key = lane_key<M>(block) + 8 * half;
      if (lane_id() % 4 != 0) continue;
      columns.total[warp_id() / 4][key] += total;
      columns.peak[warp_id() / 4][key] = max_nan(columns.peak[warp_id() / 4][key], peak);
    }
}

// ---------------------------------------------------------------------------------------------- heads of several blocks

// Copies the sums from registers to [kTileRows, kScorePitch<M>] in shared memory.
template <int M>
__device__ __forceinline__ void exchange_sums(const TileScores<M>& sums, int groups, float* exchange) {
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight) {
    if (eight / 2 >= groups) break;
#pragma unroll
    for (int block = 0; block < M; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        exchange[(lane_row(eight) + i % 2) * kScorePitch<M> + lane_key<M>(block) + i / 2 * 8] = sums[block][eight][i];
  }
}

// This block's share of a tile's keys, and a thread's part of it: four keys, and every `lanes`-th row from `lane` on.
template <int M>
struct Share {
  int32_t keys, first, quarter, lane, lanes;

  // `bits`: log2 of the blocks that share the tile.
  __device__ __forceinline__ explicit Share(int32_t bits)
      : keys(kTileKeys<M> >> bits),
        first(static_cast<int32_t>(cluster_rank()) * keys),
        quarter(first + (static_cast<int32_t>(threadIdx.x) & (keys / 4 - 1)) * 4),
        lane(static_cast<int32_t>(threadIdx.x) >> (kTileBits<M> - 2 - bits)),
        lanes(kScoreThreads >> (kTileBits<M> - 2 - bits)) {}
};

// Adds a tile of rows; sum_at(row, key) returns the sums over all heads of four keys from `key` on.
template <int M, class SumAt>
__device__ __forceinline__ void add_share(const ScoreParameters& p, int32_t b, const KeyTile& tile, const Rows& rows,
                                          const uint32_t* vision,  // [kTileKeys / 32], a bit for each vision token
                                          const Share<M>& share, ColumnsShared<M>& columns, const SumAt& sum_at) {
  float total[4] = {}, peak[4] = {};
  for (int32_t row = share.lane; row < rows.count; row += share.lanes) {
    const Pack<float, 4> sum = sum_at(row, share.quarter);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float mean = sum.at[i] * p.head_share;
      total[i] += mean;
      peak[i] = max_nan(peak[i], mean);
      if (p.map && (vision[share.quarter / 32] >> (share.quarter + i) % 32 & 1))
        p.map[(int64_t(b) * p.max_rows + rows.base + row) * p.keys + tile.first + share.quarter + i] = mean;
    }
  }
  for (int32_t delta = share.keys / 4; delta < static_cast<int32_t>(kWarp); delta *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[i] += __shfl_xor_sync(kFullMask, total[i], delta);
      peak[i] = max_nan(peak[i], __shfl_xor_sync(kFullMask, peak[i], delta));
    }
  if (static_cast<int32_t>(lane_id()) >= share.keys / 4) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    columns.total[warp_id()][share.quarter + i] += total[i];
    columns.peak[warp_id()][share.quarter + i] = max_nan(columns.peak[warp_id()][share.quarter + i], peak[i]);
  }
}

// ---------------------------------------------------------------------------------------------- results

// Writes total and peak of this block's keys; zeros for those that are no vision tokens. Called by the whole block.
template <int M>
__device__ __forceinline__ void write_columns(const ScoreParameters& p, const Sequence& s, const KeyTile& tile,
                                              const uint32_t* vision,  // [kTileKeys / 32]
                                              const Share<M>& share, const ColumnsShared<M>& columns) {
  if (p.map) return;
  __syncthreads();
  const int32_t key = share.first + static_cast<int32_t>(threadIdx.x), position = tile.first + key;
  if (static_cast<int32_t>(threadIdx.x) >= share.keys || position >= s.places) return;
  if (p.cu_k)
    for (const uint32_t taken : columns.taken[key / 32])
      if (taken >> key % 32 & 1) return;  // the last sequence wins
  float total = 0.0f, peak = 0.0f;
  if (vision[key / 32] >> key % 32 & 1)
#pragma unroll
    for (int warp = 0; warp < kScoreWarps; ++warp) {
      total += columns.total[warp][key];
      peak = max_nan(peak, columns.peak[warp][key]);
    }
  p.total[s.out + position] = total;
  p.peak[s.out + position] = peak;
}

}  // namespace mustdrop
