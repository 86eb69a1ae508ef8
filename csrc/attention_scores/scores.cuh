// SPDX-License-Identifier: Apache-2.0
// How much the query rows look at each vision token, head mean before row maximum:
//   mean[t, j] = sum over h of exp(scale q[h, t] k[h, j] - lse[h, t]) / H,  zero where j > t
//   total[j] = sum over t of mean[t, j],  peak[j] = max over t of mean[t, j];  or the map mean itself
//
// A block has one tile of keys and some of the heads (split); its threads keep the sum over those heads of their keys and
// rows in registers. Then the blocks of a cluster read each other's sums in a fixed order, each for its own keys; where
// there are no clusters the sums go through a workspace to score_finish_kernel. Query rows come in tiles, with a running
// sum and maximum. The query heads of a group find their slabs of keys in shared memory where a head has at most two.
#pragma once

#include "attention_scores/lse.cuh"

namespace mustdrop {

constexpr int kHeldHeads = 8;     // heads whose row scales are in shared memory at a time
constexpr int kScoreCluster = 8;  // blocks that share a tile at most: what every device with clusters takes

struct ScoreShared {
  TileShared tile;
  RowTile rows;
  alignas(16) RowScale scale[kHeldHeads][kTileRows];  // read two rows at a time
  uint32_t dead[kHeldHeads][kTileRows / kWarp];       // rows that see nothing
  float total[kScoreThreads], peak[kScoreThreads];
  int64_t key_offset[kTileKeys];
  uint32_t vision[kTileKeys / kWarp];  // a bit a key
  uint8_t taken[kTileKeys];            // a later sequence has the same place in the results: the last one counts
};

struct KeyTile {
  int32_t first;                // position of its first key
  uint64_t vision;              // a bit a key
  int32_t lowest, highest;      // positions of its first and last vision key, where there is one
  int32_t own_begin, own_keys;  // which keys' results this block of the cluster makes
};

// By the whole block; ends with a barrier.
__device__ __forceinline__ KeyTile describe_tile(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t tile,
                                                 ScoreShared& shared) {
  KeyTile result{};
  result.first = tile * kTileKeys;
  if (threadIdx.x < kTileKeys) {
    const int32_t position = result.first + static_cast<int32_t>(threadIdx.x);
    const int64_t offset = key_offset(p, s, position);
    const bool vision = offset >= 0 && s.types[position] == kTypeVision;
    shared.key_offset[threadIdx.x] = vision ? offset : -1;  // no other key is read
    const uint32_t bits = __ballot_sync(kFullMask, vision);
    if (lane_id() == 0) shared.vision[warp_id()] = bits;
    shared.taken[threadIdx.x] = 0;
  }
  __syncthreads();
  if (p.cu_k) {
    for (int32_t other = b + 1 + static_cast<int32_t>(threadIdx.x); other < p.batch; other += kScoreThreads) {
      const Span span = span_at(p.cu_k, other, p.keys, p.max_keys);
      const int64_t offset = span.begin - (s.out + result.first);
      for (int64_t i = clamp_to(offset, 0, kTileKeys); i < clamp_to(offset + span.length, 0, kTileKeys); ++i)
        shared.taken[i] = 1;
    }
    __syncthreads();
  }
  result.vision = shared.vision[0] | uint64_t(shared.vision[1]) << 32;
  const uint32_t low = uint32_t(result.vision), high = uint32_t(result.vision >> 32);
  result.lowest = result.first + (low ? __ffs(static_cast<int>(low)) - 1 : 31 + __ffs(static_cast<int>(high)));
  result.highest = result.first + (high ? 63 - __clz(static_cast<int>(high)) : 31 - __clz(static_cast<int>(low)));
  result.own_keys = kTileKeys / static_cast<int32_t>(cluster_size());
  result.own_begin = static_cast<int32_t>(cluster_rank()) * result.own_keys;
  return result;
}

// ---------------------------------------------------------------------------------------------- results

// A thread has one of the block's keys and every so-and-so-many-th row.
struct ColumnSums {
  int32_t key, lane, lanes;  // key in the tile; which of the rows' residues, of how many
  float total, peak;

  __device__ explicit ColumnSums(const KeyTile& tile)
      : key(tile.own_begin + static_cast<int32_t>(threadIdx.x) % tile.own_keys),
        lane(static_cast<int32_t>(threadIdx.x) / tile.own_keys),
        lanes(kScoreThreads / tile.own_keys),
        total(0.0f),
        peak(0.0f) {}

  // sum_at(row, key): the sum over all heads.
  template <class SumAt>
  __device__ __forceinline__ void add(const ScoreParameters& p, int32_t b, const KeyTile& tile, const Rows& rows,
                                      const SumAt& sum_at) {
    if (!(tile.vision >> key & 1)) return;
    for (int32_t row = lane; row < rows.count; row += lanes) {
      const float mean = sum_at(row, key) * p.head_share;
      total += mean;
      peak = max_nan(peak, mean);
      if (p.map) p.map[(int64_t(b) * p.max_rows + rows.base + row) * p.keys + tile.first + key] = mean;
    }
  }

  // By the whole block.
  __device__ __forceinline__ void write(const ScoreParameters& p, const Sequence& s, const KeyTile& tile,
                                        ScoreShared& shared) {
    if (p.map) return;
    shared.total[threadIdx.x] = total;
    shared.peak[threadIdx.x] = peak;
    __syncthreads();
    const int32_t position = tile.first + key;
    if (lane > 0 || position >= s.places || shared.taken[key]) return;
    for (int32_t other = 1; other < lanes; ++other) {
      total += shared.total[threadIdx.x + other * tile.own_keys];
      peak = max_nan(peak, shared.peak[threadIdx.x + other * tile.own_keys]);
    }
    p.total[s.out + position] = total;
    p.peak[s.out + position] = peak;
  }
};

// ---------------------------------------------------------------------------------------------- heads

// The row scales of the heads [begin, end), at most kHeldHeads. By the whole block, between barriers.
__device__ __forceinline__ void hold_scales(const ScoreParameters& p, const Sequence& s, int32_t b, const Rows& rows,
                                            int32_t begin, int32_t end, ScoreShared& shared) {
  for (int32_t i = threadIdx.x; i < (end - begin) * kTileRows; i += kScoreThreads) {
    const int32_t head = i / kTileRows, row = i % kTileRows;
    RowScale scale{0.0f, 0.0f};
    if (row < rows.count) scale = row_scale(p, s, b, begin + head, rows.base + row, shared.rows.position[row]);
    shared.scale[head][row] = scale;
    const uint32_t dead = __ballot_sync(kFullMask, scale.minus == infinity());
    if (lane_id() == 0) shared.dead[head][row / kWarp] = dead;
  }
}

// sums += the weights of one head. `masked`: some row does not see some key, or sees nothing at all.
__device__ __forceinline__ void add_weights(const ScoreParameters& p, const KeyTile& tile,
                                            const RowScale* scale,    // [kTileRows]
                                            const int32_t* position,  // [kTileRows]
                                            bool masked, int groups, TileScores& scores, TileScores& sums) {
  const int32_t key[2] = {tile.first + lane_key(), tile.first + lane_key() + 8};
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight) {
    if (eight / 2 >= groups) break;
    const int row = lane_row(eight);
    const Pack<float, 4> two = load_pack<float, 4>(&scale[row].minus);  // of two rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float minus = two.at[i % 2 * 2], factor = two.at[i % 2 * 2 + 1];
      const float weight = fast_exp2(fmaf(scores[eight][i], p.scale_log2, -minus));
      if (!masked)
        sums[eight][i] = fmaf(weight, factor, sums[eight][i]);
      else if (key[i / 2] <= position[row + i % 2] && minus != infinity())
        sums[eight][i] = fmaf(weight, factor, sums[eight][i]);
      scores[eight][i] = 0.0f;
    }
  }
}

// The sums over the heads [begin, end) for one tile of keys and one of rows. By the whole block; ends with a barrier.
template <class T>
__device__ __forceinline__ void sum_heads(const ScoreParameters& p, const Sequence& s, int32_t b, const KeyTile& tile,
                                          const Rows& rows, int32_t begin, int32_t end, ScoreShared& shared,
                                          TileScores& sums) {
  const int32_t slabs = slabs_of<T>(p.dim), group = p.heads / p.kv_heads;
  const bool resident = group > 1 && 2 * slabs <= kKeySlots;
  const int groups = warp_groups(rows.count);
  const int32_t* position = shared.rows.position;  // [kTileRows]
  const bool hidden = tile.highest > position[0];
  const auto key_slot = [&](int unit) {
    return resident ? (begin + unit / slabs) / group % 2 * slabs + unit % slabs : unit % kStages;
  };
  const auto stage = [&](int unit) {
    const int32_t head = begin + unit / slabs, slab = unit % slabs;
    if (!resident || head == begin || head % group == 0)
      stage_slab(
          shared.tile.keys[key_slot(unit)], static_cast<const T*>(p.k) + head / group * p.k_head,
          [&](int row) { return shared.key_offset[row]; }, kTileKeys, p.dim, p.k_dim, p.vector, slab);
    stage_slab(
        shared.tile.rows[unit % kStages], static_cast<const T*>(p.q) + s.q + head * p.q_head,
        [&](int row) { return row < rows.count ? (position[row] - s.first) * p.q_row : int64_t(-1); },
        (rows.count + 15) / 16 * 16, p.dim, 1, p.vector, slab);
  };
  TileScores scores{};
  const auto use = [&](int unit) {
    const int32_t turn = unit / slabs, slab = unit % slabs, held = turn % kHeldHeads;
    if (slab == 0 && held == 0) {
      const int32_t first = begin + turn;
      hold_scales(p, s, b, rows, first, first + kHeldHeads < end ? first + kHeldHeads : end, shared);
      __syncthreads();
    }
    TileProduct<T>::add(shared.tile.keys[key_slot(unit)], shared.tile.rows[unit % kStages], slab_depth<T>(p.dim, slab),
                        groups, scores);
    if (slab + 1 < slabs) return;
    uint32_t dead = 0;
#pragma unroll
    for (int i = 0; i < kTileRows / static_cast<int>(kWarp); ++i) dead |= shared.dead[held][i];
    add_weights(p, tile, shared.scale[held], position, hidden || dead, groups, scores, sums);
  };
  run_units((end - begin) * slabs, stage, use);
}

// The sums, from registers to [kTileRows, kScorePitch].
__device__ __forceinline__ void exchange_sums(const TileScores& sums, int groups, float* exchange) {
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight) {
    if (eight / 2 >= groups) break;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      exchange[(lane_row(eight) + i % 2) * kScorePitch + lane_key() + i / 2 * 8] = sums[eight][i];
  }
}

__device__ __forceinline__ float* partial_at(const ScoreParameters& p, int64_t index, int32_t split, int32_t row) {
  return p.partials + ((index * p.splits + split) * p.row_capacity + row) * kTileKeys;
}

template <class T>
__global__ void __launch_bounds__(kScoreThreads, 2) score_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(memory);
  float* exchange = reinterpret_cast<float*>(shared.tile.rows);  // [kTileRows, kScorePitch]
  const int32_t index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int32_t b = index / p.tiles;
  const Sequence s = sequence_at(p, b);
  if (index % p.tiles * kTileKeys >= s.places) return;
  const KeyTile tile = describe_tile(p, s, b, index % p.tiles, shared);
  const int32_t begin = split * p.heads / p.splits, end = (split + 1) * p.heads / p.splits;
  ColumnSums columns(tile);

  Rows rows(s);
  while (tile.vision && rows.advance(p, s, shared.rows)) {
    if (shared.rows.position[rows.count - 1] < tile.lowest) {  // none of these rows sees any of these keys
      __syncthreads();
      continue;
    }
    TileScores sums{};
    sum_heads<T>(p, s, b, tile, rows, begin, end, shared, sums);
    exchange_sums(sums, warp_groups(rows.count), exchange);
    cluster_barrier();
    if (p.partials) {
      for (int32_t i = threadIdx.x; i < rows.count * kTileKeys / 4; i += kScoreThreads) {
        const int32_t row = i / (kTileKeys / 4), piece = i % (kTileKeys / 4) * 4;
        store_pack(partial_at(p, index, split, rows.base + row) + piece,
                   load_pack<float, 4>(exchange + row * kScorePitch + piece));
      }
    } else {
      columns.add(p, b, tile, rows, [&](int32_t row, int32_t key) {
        float parts[kScoreCluster];  // all under way at once
#pragma unroll
        for (unsigned rank = 0; rank < kScoreCluster; ++rank)
          parts[rank] = rank < cluster_size() ? cluster_shared(exchange, rank)[row * kScorePitch + key] : 0.0f;
        float sum = parts[0];
#pragma unroll
        for (unsigned rank = 1; rank < kScoreCluster; ++rank) sum += parts[rank];
        return sum;
      });
    }
    cluster_barrier();
  }
  if (!p.partials) columns.write(p, s, tile, shared);
}

// Adds what the blocks of score_kernel that share a tile have left in the workspace.
__global__ void __launch_bounds__(kScoreThreads, 2) score_finish_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(memory);
  const int32_t index = blockIdx.x, b = index / p.tiles;
  const Sequence s = sequence_at(p, b);
  if (index % p.tiles * kTileKeys >= s.places) return;
  const KeyTile tile = describe_tile(p, s, b, index % p.tiles, shared);
  ColumnSums columns(tile);
  Rows rows(s);
  while (tile.vision && rows.advance(p, s, shared.rows)) {
    if (shared.rows.position[rows.count - 1] >= tile.lowest)
      columns.add(p, b, tile, rows, [&](int32_t row, int32_t key) {
        float sum = 0.0f;
        for (int32_t split = 0; split < p.splits; ++split) sum += partial_at(p, index, split, rows.base + row)[key];
        return sum;
      });
    __syncthreads();
  }
  columns.write(p, s, tile, shared);
}

}  // namespace mustdrop
