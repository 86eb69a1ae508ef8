// SPDX-License-Identifier: Apache-2.0
// The normalizer of each query row and head: log of the sum over keys j <= t that are no padding of exp(scale q[t]
// k[j]).
//
// A block processes one head and one part of the keys (split-K). Each thread keeps a maximum and a sum for its keys and
// rows; these are reduced once at the end, in a fixed order. The maximum is updated only when exceeded by 8 (in log2),
// so the sum is rarely rescaled and stays far from overflow. The blocks of a cluster merge their parts; without
// clusters row_scale merges them where they are used.
#pragma once

#include "attention_scores/product.cuh"
#include "attention_scores/slabs.cuh"

namespace mustdrop {

constexpr float kLargest = 3.402823466e+38f;
constexpr float kSlack = 8.0f;
constexpr int kMostParts = kMostCluster;   // of the keys of a head
constexpr int kPlacedTiles = kStages + 1;  // tiles between the lookup of their keys and their use

template <int M>
struct NormalizerShared {
  TileShared<M> tile;
  KeyPlaces<M> places[kPlacedTiles];
  RowTile rows;
  RowPart warps[4][kTileRows];  // of the four warps that share rows
  RowPart merged[kTileRows];
};

template <int kCount>
__device__ __forceinline__ RowPart merge_parts(const RowPart (&parts)[kCount]) {
  RowPart all{parts[0].maximum, 0.0f};
#pragma unroll
  for (int i = 1; i < kCount; ++i) all.maximum = fmaxf(all.maximum, parts[i].maximum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) all.sum += parts[i].sum * fast_exp2(parts[i].maximum - all.maximum);
  return all;
}

// scores = scale scores, in log2; -infinity where a row does not attend to a key. Products are rounded as those in the
// maximum are: a fused difference would be off by their rounding, which may be a large exponent.
template <int M, int kCount, bool kMasked>
__device__ __forceinline__ void scale_scores(TileScores<M>& scores, float scale_log2, int32_t first,
                                             const KeyPlaces<M>& places,
                                             const int32_t* position) {  // [kTileRows]
#pragma unroll
  for (int block = 0; block < M; ++block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = lane_key<M>(block) + 8 * half;
      const bool counts = !kMasked || (places.mask[key / 32] >> key % 32 & 1);
#pragma unroll
      for (int eight = 0; eight < 2 * kCount; ++eight)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = scores[block][eight][2 * half + r];
          score = product(score, scale_log2);
          if constexpr (kMasked) score = counts && first + key <= position[lane_row(eight) + r] ? score : -infinity();
        }
    }
}

// Adds scaled scores to the sums of their rows and clears them.
template <int M, int kCount>
__device__ __forceinline__ void add_scores(TileScores<M>& scores, RowPart (&sums)[kEights][2]) {
  float maximum[2 * kCount][2];
  bool exceeds = false;
#pragma unroll
  for (int eight = 0; eight < 2 * kCount; ++eight)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -infinity();
#pragma unroll
      for (int block = 0; block < M; ++block)
        top = fmaxf(top, fmaxf(scores[block][eight][r], scores[block][eight][2 + r]));
      top = fminf(top, kLargest);  // finite: infinities must not be subtracted
      const bool higher = top > sums[eight][r].maximum + kSlack;
      maximum[eight][r] = higher ? top : sums[eight][r].maximum;
      exceeds |= higher;
    }
  if (__any_sync(kFullMask, exceeds))
#pragma unroll
    for (int eight = 0; eight < 2 * kCount; ++eight)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums[eight][r].sum *= fast_exp2(sums[eight][r].maximum - maximum[eight][r]);
        sums[eight][r].maximum = maximum[eight][r];
      }
#pragma unroll
  for (int eight = 0; eight < 2 * kCount; ++eight)
#pragma unroll
    for (int block = 0; block < M; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        RowPart& sum = sums[eight][i % 2];
        sum.sum += fast_exp2(scores[block][eight][i] - sum.maximum);
        scores[block][eight][i] = 0.0f;
      }
}

// Adds the products of one part's keys with a tile of rows, [begin, begin + 64 M tiles). Called by the whole block.
template <class T, int M, bool kVector>
__device__ __forceinline__ void sum_part(const ScoreParameters& p, const Sequence& s, const T* q, const T* k,
                                         int64_t begin, int32_t tiles, int32_t count, NormalizerShared<M>& shared,
                                         RowPart (&sums)[kEights][2]) {
  const int32_t* position = shared.rows.position;  // [kTileRows]
  const int groups = warp_groups(count), copied = (count + 15) / 16 * 16;
  const bool places_a_key = threadIdx.x < kTileKeys<M>;
  const auto find = [&](int32_t tile) { return find_key(p, s, begin + int64_t(tile) * kTileKeys<M> + threadIdx.x); };
  const auto record = [&](int32_t tile, const KeyPlace& key) {
    record_key<M>(shared.places[tile % kPlacedTiles], key, key.type != kPaddingToken);
  };
  SlabRows<T, kVector, kTileKeys<M>> keys;
  SlabRows<T, kVector, kTileRows> rows;
  locate_rows(rows, p, s, position, count);

  // The slab that is staged next: `depth` elements are left of the head.
  int32_t staged_tile = 0, staged_depth = p.dim;
  const T *staged_q = q, *staged_k = k;
  bool there = false;  // the tile has a key that counts
  const auto stage = [&](int slot) {
    if (staged_depth == p.dim) there = locate_keys<T, kVector, M>(keys, shared.places[staged_tile % kPlacedTiles]);
    if (copies_piece<T>(staged_depth)) {
      keys.stage(shared.tile.keys[slot], staged_k, kTileKeys<M>, staged_depth, p.k_dim, there);
      rows.stage(shared.tile.rows[slot], staged_q, copied, staged_depth, 1);
    }
    staged_q += kSlab<T>, staged_k += kSlab<T> * p.k_dim, staged_depth -= kSlab<T>;
    if (staged_depth <= 0) staged_q = q, staged_k = k, staged_depth = p.dim, ++staged_tile;
  };
  const int32_t units = tiles * slabs_of<T>(p.dim);
  if (places_a_key)
    for (int32_t tile = 0; tile < kStages && tile < tiles; ++tile) record(tile, find(tile));
  __syncthreads();
  for (int unit = 0; unit < kStages - 1; ++unit) {
    if (unit < units) stage(unit);
    copies_commit();
  }

  TileScores<M> scores{};
  KeyPlace key{};  // of the tile kStages ahead, read a tile earlier
  if (places_a_key && kStages < tiles) key = find(kStages);
  Ring ring;
  int32_t used_tile = 0, depth = p.dim;
  for (int32_t unit = 0; unit < units; ++unit, ring.advance()) {
    copies_wait<kStages - 2>();
    __syncthreads();  // this unit's copies are complete, and the previous unit is no longer in use
    if (unit + kStages - 1 < units) stage(ring.staged);
    copies_commit();
    const bool complete = depth <= kSlab<T>;
    with_groups(groups, [&](auto constant) {
      constexpr int kCount = decltype(constant)::value;
      TileProduct<T, M>::template add<kCount>(shared.tile.keys[ring.used], shared.tile.rows[ring.used], depth, scores);
      if (!complete) return;
      const int32_t first = static_cast<int32_t>(begin) + used_tile * kTileKeys<M>;
      const KeyPlaces<M>& places = shared.places[used_tile % kPlacedTiles];
      bool masked = first + kTileKeys<M> - 1 > position[0];
#pragma unroll
      for (const uint32_t word : places.mask) masked |= word != ~0u;
      if (masked)
        scale_scores<M, kCount, true>(scores, p.scale_log2, first, places, position);
      else
        scale_scores<M, kCount, false>(scores, p.scale_log2, first, places, position);
      add_scores<M, kCount>(scores, sums);
    });
    depth -= kSlab<T>;
    if (!complete) continue;
    depth = p.dim;
    const int32_t next = used_tile++ + kStages;
    if (places_a_key && next < tiles) record(next, key);
    if (places_a_key && next + 1 < tiles) key = find(next + 1);
  }
  copies_wait<0>();
}

// Merges the parts of a block's warps, then of its cluster's blocks, and writes them. Called by the whole block; contains
// a barrier, after which the operands and the rows may be overwritten.
template <int M>
__device__ __forceinline__ void write_parts(const ScoreParameters& p, const Rows& rows, int64_t head, int32_t part,
                                            RowPart (&sums)[kEights][2], NormalizerShared<M>& shared) {
#pragma unroll
  for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // over the lanes with the same rows
      RowPart& sum = sums[eight][r];
      float maximum = sum.maximum;
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, lanes));
      sum = {maximum, sum.sum * fast_exp2(sum.maximum - maximum)};
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum.sum += __shfl_xor_sync(kFullMask, sum.sum, lanes);
    }
  if (lane_id() < 4)
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
      for (int r = 0; r < 2; ++r) shared.warps[warp_id() % 4][lane_row(eight) + r] = sums[eight][r];
  __syncthreads();
  const int32_t row = threadIdx.x;
  RowPart* out = p.parts + (head * p.row_capacity + rows.base + row) * p.part_count;
  if (row < rows.count) {
    RowPart warps[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) warps[w] = shared.warps[w][row];
    (cluster_size() == 1 ? out[part] : shared.merged[row]) = merge_parts(warps);
  }
  if (cluster_size() > 1) {
    cluster_barrier();
    if (row < rows.count && row % cluster_size() == cluster_rank()) {
      RowPart parts[kMostParts];  // loads in flight together
#pragma unroll
      for (unsigned rank = 0; rank < kMostParts; ++rank)
        parts[rank] = rank < cluster_size() ? cluster_shared(shared.merged, rank)[row] : RowPart{-kLargest, 0.0f};
      *out = merge_parts(parts);
    }
    cluster_barrier_relaxed();  // the parts have been read
  }
}

template <class T, int M, bool kVector>
__global__ void __launch_bounds__(kScoreThreads, 1) normalizer_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  NormalizerShared<M>& shared = *reinterpret_cast<NormalizerShared<M>*>(memory);
  launch_dependents();
  const int32_t part = blockIdx.x % p.part_splits, head = blockIdx.x / p.part_splits % p.heads;
  const int32_t b = blockIdx.x / p.part_splits / p.heads;
  const Sequence s = sequence_at(p, b);
  const T* q = static_cast<const T*>(p.q) + s.q + head * p.q_head;
  const T* k = static_cast<const T*>(p.k) + head / p.group * p.k_head;
  const int64_t begin = int64_t(part) * p.part_tiles * kTileKeys<M>;

  Rows rows;
  rows.start(s, b);
  while (rows.advance(p, s, shared.rows)) {
    const int32_t last = shared.rows.position[rows.count - 1];
    const int64_t end = clamp_to(begin + int64_t(p.part_tiles) * kTileKeys<M>, 0, last + 1);
    RowPart sums[kEights][2];
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) sums[eight][0] = sums[eight][1] = {-kLargest, 0.0f};
    if (begin < end)
      sum_part<T, M, kVector>(p, s, q, k, begin, static_cast<int32_t>(ceil_div(end - begin, kTileKeys<M>)), rows.count,
                              shared, sums);
    write_parts<M>(p, rows, int64_t(b) * p.heads + head, part, sums, shared);
  }
}

// Maps a score s of one row and head to its share of the head mean: 2^(s scale_log2 - minus) * factor.
struct alignas(8) RowScale {
  float minus, factor;
};

// A row that attends to no key has minus = +infinity; its weights count as zero.
template <bool kGivenLse>
__device__ __forceinline__ RowScale row_scale(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t head,
                                              int32_t row, int32_t position) {
  if constexpr (kGivenLse) {
    const float lse = p.lse[s.lse + head * p.lse_head + (position - s.first) * p.lse_row];
    if (lse == -infinity()) return {infinity(), 0.0f};
    return {lse * kLog2E, 1.0f};
  } else {
    const RowPart* parts = p.parts + ((int64_t(b) * p.heads + head) * p.row_capacity + row) * p.part_count;
    RowPart sum = parts[0];
    if (p.part_count > 1) {
      RowPart all[kMostParts];  // loads in flight together
#pragma unroll
      for (int i = 0; i < kMostParts; ++i) all[i] = i < p.part_count ? parts[i] : RowPart{-kLargest, 0.0f};
      sum = merge_parts(all);
    }
    if (sum.sum == 0.0f) return {infinity(), 0.0f};
    return {sum.maximum, 1.0f / sum.sum};
  }
}

}  // namespace mustdrop
