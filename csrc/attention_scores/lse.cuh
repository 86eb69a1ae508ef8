// SPDX-License-Identifier: Apache-2.0
// The normalizer of each query row and head: log of the sum over keys j <= t that are no padding of exp(scale q[t]
// k[j]).
//
// A block processes one head and one part of the keys (split-K). Each thread keeps a maximum and a sum for its keys and
// rows; these are reduced once at the end, in a fixed order. The maximum is updated only when exceeded by 8 (in log2),
// so the sum is rarely rescaled and stays far from overflow. row_scale merges the parts where they are used.
#pragma once

#include "attention_scores/tile.cuh"

namespace mustdrop {

constexpr float kLargest = 3.402823466e+38f;
constexpr float kSlack = 8.0f;

template <int M>
struct NormalizerShared {
  TileShared<M> tile;
  RowTile rows;
  RowPart parts[4][kTileRows];  // of the four warps that share rows
};

__device__ __forceinline__ RowPart merge_parts(RowPart a, RowPart b) {
  const float maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
  return {maximum, a.sum * fast_exp2(a.maximum - maximum) + b.sum * fast_exp2(b.maximum - maximum)};
}

// Adds two scores where they are visible. Products are rounded as those in the maximum are: a fused difference would be
// off by their rounding, which may be a large exponent.
__device__ __forceinline__ void add_scores(RowPart& part, float s0, float s1, bool seen0, bool seen1, float scale) {
  const float x0 = seen0 ? product(s0, scale) : -kLargest, x1 = seen1 ? product(s1, scale) : -kLargest;
  const float top = fminf(fmaxf(x0, x1), kLargest);  // finite: infinities must not be subtracted
  if (top > part.maximum + kSlack) {
    part.sum *= fast_exp2(part.maximum - top);
    part.maximum = top;
  }
  part.sum += (seen0 ? fast_exp2(x0 - part.maximum) : 0.0f) + (seen1 ? fast_exp2(x1 - part.maximum) : 0.0f);
}

// This thread's two keys of a block of 16.
struct LaneKeys {
  int32_t position[2];
  bool there[2];
};

template <int M>
__device__ __forceinline__ LaneKeys lane_keys(const ScoreParameters& p, const Sequence& s, int32_t first, int block) {
  LaneKeys keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.position[half] = first + lane_key<M>(block) + 8 * half;
    const bool inside = keys.position[half] < s.length && (!s.table || key_offset(p, s, keys.position[half]) >= 0);
    keys.there[half] = inside && s.types[keys.position[half]] != kPaddingToken;
  }
  return keys;
}

template <class T, int M>
__global__ void __launch_bounds__(kScoreThreads, kResident<T, M>)
    normalizer_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  NormalizerShared<M>& shared = *reinterpret_cast<NormalizerShared<M>*>(memory);
  const int32_t part = blockIdx.x % p.part_count, head = blockIdx.x / p.part_count % p.heads;
  const int32_t b = blockIdx.x / p.part_count / p.heads;
  const Sequence s = sequence_at(p, b);
  const T* q = static_cast<const T*>(p.q) + s.q + head * p.q_head;
  const T* k = static_cast<const T*>(p.k) + head / (p.heads / p.kv_heads) * p.k_head;
  const int32_t slabs = slabs_of<T>(p.dim);
  const int64_t begin = int64_t(part) * p.part_tiles * kTileKeys<M>;

  Rows rows(s);
  while (rows.advance(p, s, shared.rows)) {
    const int32_t* position = shared.rows.position;  // [kTileRows]
    const int64_t end = clamp_to(begin + int64_t(p.part_tiles) * kTileKeys<M>, 0, position[rows.count - 1] + 1);
    const int32_t tiles = begin < end ? static_cast<int32_t>(ceil_div(end - begin, kTileKeys<M>)) : 0;
    const int groups = warp_groups(rows.count);
    RowPart sums[kEights][2];
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) sums[eight][0] = sums[eight][1] = {-kLargest, 0.0f};
    TileScores<M> scores{};

    int32_t staged_key = static_cast<int32_t>(begin), staged_slab = 0, used_key = staged_key, used_slab = 0;
    const auto stage = [&](int slot) {
      stage_slab(
          shared.tile.keys[slot], k, [&](int row) { return key_offset(p, s, staged_key + row); }, kTileKeys<M>, p.dim,
          p.k_dim, p.vector, staged_slab);
      stage_slab(
          shared.tile.rows[slot], q,
          [&](int row) { return row < rows.count ? (position[row] - s.first) * p.q_row : int64_t(-1); },
          (rows.count + 15) / 16 * 16, p.dim, 1, p.vector, staged_slab);
      if (++staged_slab == slabs) staged_slab = 0, staged_key += kTileKeys<M>;
    };
    const auto use = [&](int slot) {
      TileProduct<T, M>::add(shared.tile.keys[slot], shared.tile.rows[slot], slab_depth<T>(p.dim, used_slab), groups,
                             scores);
      if (++used_slab < slabs) return;
      used_slab = 0;
#pragma unroll
      for (int block = 0; block < M; ++block) {
        const LaneKeys keys = lane_keys<M>(p, s, used_key, block);
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          if (eight / 2 >= groups) break;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int32_t at = position[lane_row(eight) + r];
            float *low = &scores[block][eight][r], *high = &scores[block][eight][2 + r];
            add_scores(sums[eight][r], *low, *high, keys.there[0] && keys.position[0] <= at,
                       keys.there[1] && keys.position[1] <= at, p.scale_log2);
            *low = *high = 0.0f;
          }
        }
      }
      used_key += kTileKeys<M>;
    };
    run_units(tiles * slabs, stage, use);

#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      if (eight / 2 >= groups) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowPart sum = sums[eight][r];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
          sum = merge_parts(
              sum, {__shfl_xor_sync(kFullMask, sum.maximum, lanes), __shfl_xor_sync(kFullMask, sum.sum, lanes)});
        if (lane_id() < 4) shared.parts[warp_id() % 4][lane_row(eight) + r] = sum;
      }
    }
    __syncthreads();
    for (int32_t row = threadIdx.x; row < rows.count; row += kScoreThreads) {
      RowPart sum = shared.parts[0][row];
#pragma unroll
      for (int w = 1; w < 4; ++w) sum = merge_parts(sum, shared.parts[w][row]);
      p.parts[((int64_t(b) * p.heads + head) * p.row_capacity + rows.base + row) * p.part_count + part] = sum;
    }
  }
}

// Maps a score s of one row and head to its share of the head mean: 2^(s scale_log2 - minus) * factor.
struct alignas(8) RowScale {
  float minus, factor;
};

// A row that attends to no key has minus = +infinity; its weights count as zero.
__device__ __forceinline__ RowScale row_scale(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t head,
                                              int32_t row, int32_t position) {
  if (p.lse) {
    const float lse = p.lse[s.lse + head * p.lse_head + (position - s.first) * p.lse_row];
    if (lse == -infinity()) return {infinity(), 0.0f};
    return {lse * kLog2E, 1.0f};
  }
  const RowPart* parts = p.parts + ((int64_t(b) * p.heads + head) * p.row_capacity + row) * p.part_count;
  RowPart sum = parts[0];
  for (int32_t i = 1; i < p.part_count; ++i) sum = merge_parts(sum, parts[i]);
  if (sum.sum == 0.0f) return {infinity(), 0.0f};
  return {sum.maximum, 1.0f / sum.sum};
}

}  // namespace mustdrop
