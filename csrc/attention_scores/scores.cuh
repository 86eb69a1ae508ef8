// SPDX-License-Identifier: Apache-2.0
// Attention of the query rows to each vision token, head mean before row maximum:
//   mean[t, j] = sum over h of exp(scale q[h, t] k[h, j] - lse[h, t]) / H,  zero where j > t
//   total[j] = sum over t of mean[t, j],  peak[j] = max over t of mean[t, j];  or the map mean itself
//
// A block processes one tile of keys and some of the heads (split); its threads accumulate the sum over these heads in
// registers. Then the blocks of a cluster read each other's sums in a fixed order, each for its own keys; without
// clusters the sums go through a workspace to score_finish_kernel. Query rows are processed in tiles, with a running
// sum and maximum. The query heads of a group reuse the slabs of keys in shared memory if a head has at most two.
#pragma once

#include "attention_scores/lse.cuh"

namespace mustdrop {

constexpr int kHeldHeads = 8;     // heads whose row scales are in shared memory together
constexpr int kScoreCluster = 8;  // blocks that share a tile at most: the portable cluster size

template <int M>
struct ScoreShared {
  TileShared<M> tile;
  RowTile rows;
  alignas(16) RowScale scale[kHeldHeads][kTileRows];  // read two rows at a time
  uint32_t dead[kHeldHeads][kTileRows / kWarp];       // rows that attend to no key
  float total[kScoreThreads], peak[kScoreThreads];    // of a thread's rows and key
  int64_t key_offset[kTileKeys<M>];                   // -1: no vision token
  uint32_t vision[kTileKeys<M> / kWarp];              // a bit a key
  // A bit a key, from each warp: a later sequence writes the same result.
  uint32_t taken[kTileKeys<M> / kWarp][kScoreThreads / kWarp];
};

struct KeyTile {
  int32_t first;            // position of its first key
  int32_t lowest, highest;  // positions of its first and last vision token; lowest > highest: there is none
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

// Called by the whole block; contains a barrier.
template <int M>
__device__ __forceinline__ KeyTile describe_tile(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t tile,
                                                 ScoreShared<M>& shared) {
  constexpr int kWords = kTileKeys<M> / static_cast<int>(kWarp);
  const int32_t first = tile * kTileKeys<M>;
  KeyTile result{first, first + kTileKeys<M>, -1};
  if (threadIdx.x < kTileKeys<M>) {
    const int32_t position = first + static_cast<int32_t>(threadIdx.x);
    const int64_t offset = key_offset(p, s, position);
    const bool vision = offset >= 0 && s.types[position] == kVisionToken;
    shared.key_offset[threadIdx.x] = vision ? offset : -1;  // other keys are not read
    const uint32_t bits = __ballot_sync(kFullMask, vision);
    if (lane_id() == 0) shared.vision[warp_id()] = bits;
  }
  if (p.cu_k)
    for (int word = 0; word < kWords; ++word) {
      const uint32_t taken = taken_later(p, s, b, first + 32 * word);
      if (lane_id() == 0) shared.taken[word][warp_id()] = taken;
    }
  shared.total[threadIdx.x] = shared.peak[threadIdx.x] = 0.0f;
  __syncthreads();
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const int bits = static_cast<int>(shared.vision[word]);
    if (bits == 0) continue;
    if (result.highest < 0) result.lowest = first + 32 * word + __ffs(bits) - 1;
    result.highest = first + 32 * word + 31 - __clz(bits);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------- results

// A thread's part of the results: one key of its block's share in the cluster, and every `lanes`-th row from `lane` on.
template <int M>
struct Column {
  int32_t keys, key, lane, lanes;  // keys of the block; key in the tile; first row; row step

  __device__ __forceinline__ Column()
      : keys(kTileKeys<M> / static_cast<int32_t>(cluster_size())),
        key(static_cast<int32_t>(cluster_rank()) * keys + static_cast<int32_t>(threadIdx.x) % keys),
        lane(static_cast<int32_t>(threadIdx.x) / keys),
        lanes(kScoreThreads / keys) {}
};

// Adds a tile of rows to the results; sum_at(row, key) returns the sum over all heads.
template <int M, class SumAt>
__device__ __forceinline__ void add_rows(const ScoreParameters& p, int32_t b, const KeyTile& tile, const Rows& rows,
                                         ScoreShared<M>& shared, const SumAt& sum_at) {
  const Column<M> column;
  if (shared.key_offset[column.key] < 0) return;
  float total = shared.total[threadIdx.x], peak = shared.peak[threadIdx.x];
  for (int32_t row = column.lane; row < rows.count; row += column.lanes) {
    const float mean = sum_at(row, column.key) * p.head_share;
    total += mean;
    peak = max_nan(peak, mean);
    if (p.map) p.map[(int64_t(b) * p.max_rows + rows.base + row) * p.keys + tile.first + column.key] = mean;
  }
  shared.total[threadIdx.x] = total;
  shared.peak[threadIdx.x] = peak;
}

// Writes total and peak. Called by the whole block.
template <int M>
__device__ __forceinline__ void write_columns(const ScoreParameters& p, const Sequence& s, const KeyTile& tile,
                                              ScoreShared<M>& shared) {
  if (p.map) return;
  __syncthreads();
  const Column<M> column;
  const int32_t position = tile.first + column.key;
  if (column.lane > 0 || position >= s.places) return;
  if (p.cu_k)
    for (const uint32_t taken : shared.taken[column.key / 32])
      if (taken >> column.key % 32 & 1) return;  // the last sequence wins
  float total = shared.total[threadIdx.x], peak = shared.peak[threadIdx.x];
  for (int32_t other = 1; other < column.lanes; ++other) {
    total += shared.total[threadIdx.x + other * column.keys];
    peak = max_nan(peak, shared.peak[threadIdx.x + other * column.keys]);
  }
  p.total[s.out + position] = total;
  p.peak[s.out + position] = peak;
}

// ---------------------------------------------------------------------------------------------- heads

// Computes the row scales of the heads [begin, end), at most kHeldHeads. Called by the whole block, between barriers.
template <int M>
__device__ __forceinline__ void hold_scales(const ScoreParameters& p, const Sequence& s, int32_t b, const Rows& rows,
                                            int32_t begin, int32_t end, ScoreShared<M>& shared) {
  for (int32_t i = threadIdx.x; i < (end - begin) * kTileRows; i += kScoreThreads) {
    const int32_t head = i / kTileRows, row = i % kTileRows;
    RowScale scale{0.0f, 0.0f};
    if (row < rows.count) scale = row_scale(p, s, b, begin + head, rows.base + row, shared.rows.position[row]);
    shared.scale[head][row] = scale;
    const uint32_t dead = __ballot_sync(kFullMask, scale.minus == infinity());
    if (lane_id() == 0) shared.dead[head][row / kWarp] = dead;
  }
}

// sums += the weights of one head. `masked`: some row does not attend to some key, or to none.
template <int M>
__device__ __forceinline__ void add_weights(const ScoreParameters& p, const KeyTile& tile,
                                            const RowScale* scale,    // [kTileRows]
                                            const int32_t* position,  // [kTileRows]
                                            bool masked, int groups, TileScores<M>& scores, TileScores<M>& sums) {
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight) {
    if (eight / 2 >= groups) break;
    const int row = lane_row(eight);
    const Pack<float, 4> two = load_pack<float, 4>(&scale[row].minus);  // of two rows
#pragma unroll
    for (int block = 0; block < M; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float minus = two.at[i % 2 * 2], factor = two.at[i % 2 * 2 + 1];
        const int32_t key = tile.first + lane_key<M>(block) + i / 2 * 8;
        float &score = scores[block][eight][i], &sum = sums[block][eight][i];
        const float weight = fast_exp2(product(score, p.scale_log2) - minus);
        if (!masked || (key <= position[row + i % 2] && minus != infinity())) sum = fmaf(weight, factor, sum);
        score = 0.0f;
      }
  }
}

// Iterates over the slabs of successive query heads.
struct HeadCursor {
  int32_t head, slab, key_head, in_group;  // in_group: index among the query heads of key_head

  __device__ HeadCursor(int32_t head, int32_t group)
      : head(head), slab(0), key_head(head / group), in_group(head % group) {}

  __device__ __forceinline__ void advance(int32_t slabs, int32_t group) {
    if (++slab < slabs) return;
    slab = 0;
    ++head;
    if (++in_group == group) in_group = 0, ++key_head;
  }
};

// Computes the sums over the heads [begin, end) for one tile of keys and one of rows. Called by the whole block; ends
// with a barrier.
template <class T, int M>
__device__ __forceinline__ void sum_heads(const ScoreParameters& p, const Sequence& s, int32_t b, const KeyTile& tile,
                                          const Rows& rows, int32_t begin, int32_t end, ScoreShared<M>& shared,
                                          TileScores<M>& sums) {
  const int32_t slabs = slabs_of<T>(p.dim), group = p.heads / p.kv_heads;
  const bool resident = group > 1 && 2 * slabs <= kKeySlots;
  const int groups = warp_groups(rows.count);
  const int32_t* position = shared.rows.position;  // [kTileRows]
  const bool hidden = tile.highest > position[0];
  // Resident slabs of keys occupy alternating halves of the ring for successive key heads.
  const auto key_slot = [&](const HeadCursor& at, int slot) {
    return resident ? at.key_head % 2 * slabs + at.slab : slot;
  };
  HeadCursor staged(begin, group), used(begin, group);
  const auto stage = [&](int slot) {
    if (!resident || staged.head == begin || staged.in_group == 0)
      stage_slab(
          shared.tile.keys[key_slot(staged, slot)], static_cast<const T*>(p.k) + staged.key_head * p.k_head,
          [&](int row) { return shared.key_offset[row]; }, kTileKeys<M>, p.dim, p.k_dim, p.vector, staged.slab);
    stage_slab(
        shared.tile.rows[slot], static_cast<const T*>(p.q) + s.q + staged.head * p.q_head,
        [&](int row) { return row < rows.count ? (position[row] - s.first) * p.q_row : int64_t(-1); },
        (rows.count + 15) / 16 * 16, p.dim, 1, p.vector, staged.slab);
    staged.advance(slabs, group);
  };
  TileScores<M> scores{};
  const auto use = [&](int slot) {
    const int32_t held = (used.head - begin) % kHeldHeads;
    if (used.slab == 0 && held == 0) {
      const int32_t last = used.head + kHeldHeads;
      hold_scales(p, s, b, rows, used.head, last < end ? last : end, shared);
      __syncthreads();
    }
    TileProduct<T, M>::add(shared.tile.keys[key_slot(used, slot)], shared.tile.rows[slot],
                           slab_depth<T>(p.dim, used.slab), groups, scores);
    used.advance(slabs, group);
    if (used.slab > 0) return;
    uint32_t dead = 0;
#pragma unroll
    for (int i = 0; i < kTileRows / static_cast<int>(kWarp); ++i) dead |= shared.dead[held][i];
    add_weights(p, tile, shared.scale[held], position, hidden || dead, groups, scores, sums);
  };
  run_units((end - begin) * slabs, stage, use);
}

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

template <int M>
__device__ __forceinline__ float* partial_at(const ScoreParameters& p, int64_t index, int32_t split, int32_t row) {
  return p.partials + ((index * p.splits + split) * p.row_capacity + row) * kTileKeys<M>;
}

template <class T, int M>
__global__ void __launch_bounds__(kScoreThreads, kResident<T, M>)
    score_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared<M>& shared = *reinterpret_cast<ScoreShared<M>*>(memory);
  float* exchange = reinterpret_cast<float*>(&shared.tile);  // [kTileRows, kScorePitch<M>]
  const int32_t index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int32_t b = index / p.tiles;
  const Sequence s = sequence_at(p, b);
  if (index % p.tiles * kTileKeys<M> >= s.places) return;
  const KeyTile tile = describe_tile(p, s, b, index % p.tiles, shared);
  const int32_t begin = split * p.heads / p.splits, end = (split + 1) * p.heads / p.splits;

  Rows rows(s);
  while (tile.lowest <= tile.highest && rows.advance(p, s, shared.rows)) {
    if (shared.rows.position[rows.count - 1] < tile.lowest) {  // no row attends to any of the keys
      __syncthreads();
      continue;
    }
    TileScores<M> sums{};
    sum_heads<T, M>(p, s, b, tile, rows, begin, end, shared, sums);
    exchange_sums<M>(sums, warp_groups(rows.count), exchange);
    cluster_barrier();
    if (p.partials) {
      for (int32_t i = threadIdx.x; i < rows.count * kTileKeys<M> / 4; i += kScoreThreads) {
        const int32_t row = i / (kTileKeys<M> / 4), piece = i % (kTileKeys<M> / 4) * 4;
        store_pack(partial_at<M>(p, index, split, rows.base + row) + piece,
                   load_pack<float, 4>(exchange + row * kScorePitch<M> + piece));
      }
    } else {
      add_rows(p, b, tile, rows, shared, [&](int32_t row, int32_t key) {
        float parts[kScoreCluster];  // loads in flight together
#pragma unroll
        for (unsigned rank = 0; rank < kScoreCluster; ++rank)
          parts[rank] = rank < cluster_size() ? cluster_shared(exchange, rank)[row * kScorePitch<M> + key] : 0.0f;
        float sum = parts[0];
#pragma unroll
        for (unsigned rank = 1; rank < kScoreCluster; ++rank) sum += parts[rank];
        return sum;
      });
    }
    cluster_barrier();
  }
  if (!p.partials) write_columns(p, s, tile, shared);
}

// Adds the partial sums of the blocks of score_kernel that share a tile.
template <int M>
__global__ void __launch_bounds__(kScoreThreads, 2) score_finish_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared<M>& shared = *reinterpret_cast<ScoreShared<M>*>(memory);
  const int32_t index = blockIdx.x, b = index / p.tiles;
  const Sequence s = sequence_at(p, b);
  if (index % p.tiles * kTileKeys<M> >= s.places) return;
  const KeyTile tile = describe_tile(p, s, b, index % p.tiles, shared);
  Rows rows(s);
  while (tile.lowest <= tile.highest && rows.advance(p, s, shared.rows)) {
    if (shared.rows.position[rows.count - 1] >= tile.lowest)
      add_rows(p, b, tile, rows, shared, [&](int32_t row, int32_t key) {
        float sum = 0.0f;
        for (int32_t split = 0; split < p.splits; ++split) sum += partial_at<M>(p, index, split, rows.base + row)[key];
        return sum;
      });
    __syncthreads();
  }
  write_columns(p, s, tile, shared);
}

}  // namespace mustdrop
