// SPDX-License-Identifier: Apache-2.0
// total[j] and peak[j] of each vision token j: sum and maximum over the query rows t of
// mean over h of exp(scale q[h, t] k[h, j] - lse[h, t]).
//
// A block, or the blocks of a cluster with some heads each, processes a tile of keys; it iterates over tiles of query
// rows, and over the heads inside, whose weights are summed in registers. Causality does not depend on the head, so it
// is applied to the sums. The copies of the first keys start before the query rows are found.
#pragma once

#include "attention_scores/columns.cuh"
#include "attention_scores/lse.cuh"

namespace mustdrop {

template <int M>
struct ScoreShared {
  TileShared<M> tile;
  RowTile rows;
  alignas(16) RowScale scale[2][kTileRows];  // of the head in use and the next one; read two rows at a time
  uint32_t dead[2][kTileRows / kWarp];       // a bit for each row that attends to no key
  KeyPlaces<M> places;                       // of the vision tokens
  ColumnsShared<M> columns;
};

// Finds the vision tokens of a tile. Called by the whole block; contains a barrier.
template <int M>
__device__ __forceinline__ KeyTile find_tile(const ScoreParameters& p, const Sequence& s, int32_t b, int32_t tile,
                                             ScoreShared<M>& shared) {
  const int32_t first = tile * kTileKeys<M>;
  const bool places_a_key = threadIdx.x < kTileKeys<M>;
  const KeyPlace key = places_a_key ? find_key(p, s, int64_t(first) + threadIdx.x) : KeyPlace{};
  clear_columns<M>(p, s, b, first, shared.columns);
  if (places_a_key) record_key<M>(shared.places, key, key.type == kVisionToken);
  __syncthreads();
  KeyTile result{first, first + kTileKeys<M>, -1};
#pragma unroll
  for (int word = 0; word < kTileKeys<M> / static_cast<int>(kWarp); ++word) {
    const int bits = static_cast<int>(shared.places.mask[word]);
    if (bits == 0) continue;
    if (result.highest < 0) result.lowest = first + 32 * word + __ffs(bits) - 1;
    result.highest = first + 32 * word + 31 - __clz(bits);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------- operands

// Heads of a block, whose keys and query rows are copied slab by slab. If the slabs of two key heads fit, those of the
// current one stay for all of its query heads, in alternating halves of the slots.
template <class T>
struct Heads {
  int32_t begin, end;      // query heads
  int32_t key_head, left;  // of the first one; query heads of it from the first one on
  int32_t slabs;
  bool resident;
  int32_t key_slots;

  __device__ __forceinline__ Heads(const ScoreParameters& p, int32_t begin, int32_t end)
      : begin(begin),
        end(end),
        key_head(p.group == 1 ? begin : begin / p.group),
        left((key_head + 1) * p.group - begin),
        slabs(slabs_of<T>(p.dim)),
        resident(p.group > 1 && 2 * slabs <= kKeySlots),
        key_slots(resident ? 2 * slabs : kStages) {}

  __device__ __forceinline__ int32_t units() const { return (end - begin) * slabs; }
};

// One slab of one head after the other.
template <class T>
struct HeadCursor {
  int32_t head, depth;     // elements of the head from this slab on
  int32_t left, key_slot;  // query heads of the key head from this one on

  __device__ __forceinline__ HeadCursor(const ScoreParameters& p, const Heads<T>& heads)
      : head(heads.begin), depth(p.dim), left(heads.left), key_slot(0) {}

  __device__ __forceinline__ bool ends_head() const { return depth <= kSlab<T>; }
  __device__ __forceinline__ bool ends_key_head() const { return ends_head() && left == 1; }

  __device__ __forceinline__ void advance(const ScoreParameters& p, const Heads<T>& heads) {
    const bool next_head = ends_head(), next_key_head = ends_key_head();
    if (++key_slot == heads.key_slots) key_slot = 0;
    if (next_head && !next_key_head && heads.resident) key_slot = key_slot == 0 ? heads.slabs : 0;
    depth = next_head ? p.dim : depth - kSlab<T>;
    head += next_head;
    left = next_key_head ? p.group : left - next_head;
  }
};

// The copies of a block's operands, kStages - 1 units ahead of their use.
template <class T, int M, bool kVector>
struct HeadCopies {
  const ScoreParameters& p;
  const Heads<T>& heads;
  TileShared<M>& tile;
  SlabRows<T, kVector, kTileKeys<M>> keys;
  SlabRows<T, kVector, kTileRows> rows;
  int32_t count;   // rows
  const T *k, *q;  // of the first head

  __device__ __forceinline__ HeadCopies(const ScoreParameters& p, const Sequence& s, const Heads<T>& heads,
                                        ScoreShared<M>& shared)
      : p(p),
        heads(heads),
        tile(shared.tile),
        count(0),
        k(static_cast<const T*>(p.k) + heads.key_head * p.k_head),
        q(static_cast<const T*>(p.q) + s.q + heads.begin * p.q_head) {
    locate_keys<T, kVector, M>(keys, shared.places);
  }

  // The operands of one unit.
  struct Unit {
    HeadCursor<T> at;
    const T *k, *q;
    bool new_keys;  // that are not in shared memory yet
  };
  __device__ __forceinline__ Unit first() const { return {HeadCursor<T>(p, heads), k, q, true}; }

  __device__ __forceinline__ void advance(Unit& unit) const {
    const bool next_head = unit.at.ends_head(), next_key_head = unit.at.ends_key_head();
    unit.k += next_key_head ? p.k_next_head : next_head ? p.k_same_head : p.k_slab;
    unit.q += next_head ? p.q_next_head : kSlab<T>;
    unit.new_keys = next_key_head || (unit.new_keys && !next_head) || !heads.resident;
    unit.at.advance(p, heads);
  }

  __device__ __forceinline__ void stage_keys(const Unit& unit) const {
    if (unit.new_keys) keys.stage(tile.keys[unit.at.key_slot], unit.k, kTileKeys<M>, unit.at.depth, p.k_dim);
  }
  __device__ __forceinline__ void stage_rows(const Unit& unit, int slot) const {
    rows.stage(tile.rows[slot], unit.q, count, unit.at.depth, 1);
  }

  // Starts the copies of the first units of keys.
  __device__ __forceinline__ void start_keys() const {
    Unit unit = first();
    for (int i = 0; i < kStages - 1 && i < heads.units(); ++i, advance(unit))
      if (copies_piece<T>(unit.at.depth)) stage_keys(unit);
    copies_commit();
  }

  // Those of the rows, a group of copies each; the keys precede them. Returns the next unit.
  __device__ __forceinline__ Unit start_rows(const Sequence& s, const int32_t* position, int32_t row_count) {
    count = (row_count + 15) / 16 * 16;
    locate_rows(rows, p, s, position, row_count);
    Unit unit = first();
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < heads.units() && copies_piece<T>(unit.at.depth)) stage_rows(unit, i);
      advance(unit);
      copies_commit();
    }
    return unit;
  }
};

// ---------------------------------------------------------------------------------------------- heads

// Records the scale of this thread's row. Called by the first kTileRows threads.
template <int M>
__device__ __forceinline__ void record_scale(ScoreShared<M>& shared, int32_t head, const RowScale& scale) {
  shared.scale[head % 2][threadIdx.x] = scale;
  const uint32_t dead = __ballot_sync(kFullMask, scale.minus == infinity());
  if (lane_id() == 0) shared.dead[head % 2][warp_id()] = dead;
}

// Clears the scores of rows that attend to no key: infinity and NaN must not count either.
template <int M>
__device__ __forceinline__ void clear_dead(const RowScale* scale, TileScores<M>& scores) {
  each_score<M>(scores, [&](float& score, int row, int) {
    if (scale[row].minus == infinity()) score = 0.0f;
  });
}

// sums += the weights of one head; clears the scores.
template <int M, int kCount>
__device__ __forceinline__ void add_weights(const RowScale* scale,  // [kTileRows]
                                            float scale_log2, TileScores<M>& scores, TileScores<M>& sums) {
#pragma unroll
  for (int eight = 0; eight < 2 * kCount; ++eight) {
    const Pack<float, 4> two = load_pack<float, 4>(&scale[lane_row(eight)].minus);  // of two rows
#pragma unroll
    for (int block = 0; block < M; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float minus = two.at[i % 2 * 2], factor = two.at[i % 2 * 2 + 1];
        float &score = scores[block][eight][i], &sum = sums[block][eight][i];
        sum = fmaf(fast_exp2(product(score, scale_log2) - minus), factor, sum);
        score = 0.0f;
      }
  }
}

// Clears the sums of keys that a row does not attend to.
template <int M>
__device__ __forceinline__ void apply_causality(const KeyTile& tile, const int32_t* position, TileScores<M>& sums) {
  each_score<M>(sums, [&](float& sum, int row, int key) {
    if (tile.first + key > position[row]) sum = 0.0f;
  });
}

// Computes the sums over a block's heads for one tile of keys, whose copies have started, and one of rows. Called by the
// whole block.
template <bool kGivenLse, class T, int M, bool kVector>
__device__ __forceinline__ void sum_heads(const ScoreParameters& p, const Sequence& s, int32_t b, const Rows& rows,
                                          const Heads<T>& heads, HeadCopies<T, M, kVector>& copies,
                                          ScoreShared<M>& shared, TileScores<M>& sums) {
  const int32_t units = heads.units(), row = threadIdx.x;
  const int groups = warp_groups(rows.count);
  const auto scale_of = [&](int32_t head) {
    return row < rows.count ? row_scale<kGivenLse>(p, s, b, head, rows.base + row, shared.rows.position[row])
                            : RowScale{0.0f, 0.0f};
  };
  auto staged = copies.start_rows(s, shared.rows.position, rows.count);
  HeadCursor<T> used(p, heads);
  if (row < kTileRows) record_scale<M>(shared, used.head, scale_of(used.head));
  RowScale next{};  // of the next head, read a head ahead of its use
  if (used.head + 1 < heads.end) next = scale_of(used.head + 1);

  TileScores<M> scores{};
  Ring ring;
  for (int32_t unit = 0; unit < units; ++unit, ring.advance(), used.advance(p, heads)) {
    copies_wait<kStages - 2>();
    __syncthreads();  // this unit's copies are complete, and the previous unit is no longer in use
    if (unit + kStages - 1 < units) {
      if (copies_piece<T>(staged.at.depth)) {
        copies.stage_keys(staged);
        copies.stage_rows(staged, ring.staged);
      }
      copies.advance(staged);
    }
    copies_commit();
    with_groups(groups, [&](auto constant) {
      constexpr int kCount = decltype(constant)::value;
      TileProduct<T, M>::template add<kCount>(shared.tile.keys[used.key_slot], shared.tile.rows[ring.used], used.depth,
                                              scores);
      if (!used.ends_head()) return;
      const RowScale* scale = shared.scale[used.head % 2];
      const uint32_t* dead = shared.dead[used.head % 2];
      if (dead[0] | dead[1] | dead[2] | dead[3]) clear_dead<M>(scale, scores);
      add_weights<M, kCount>(scale, p.scale_log2, scores, sums);
    });
    if (used.ends_head() && used.head + 1 < heads.end) {
      if (row < kTileRows) record_scale<M>(shared, used.head + 1, next);
      if (used.head + 2 < heads.end) next = scale_of(used.head + 2);
    }
  }
  copies_wait<0>();
}

template <int M>
__device__ __forceinline__ float* partial_at(const ScoreParameters& p, int64_t index, int32_t split, int32_t row) {
  return p.partials + (((index << p.split_bits) + split) * p.row_capacity + row) * kTileKeys<M>;
}

// Adds the sums of a tile of rows to the results, over the blocks that share the tile of keys. Called by the whole
// block.
template <int M>
__device__ __forceinline__ void combine_heads(const ScoreParameters& p, int32_t b, int32_t index, int32_t split,
                                              const KeyTile& tile, const Rows& rows, const TileScores<M>& sums,
                                              ScoreShared<M>& shared) {
  if (p.split_bits == 0 && !p.map) return add_columns<M>(p.head_share, sums, rows.count, shared.columns);
  __syncthreads();                                           // the sums overwrite the operands
  float* exchange = reinterpret_cast<float*>(&shared.tile);  // [kTileRows, kScorePitch<M>]
  exchange_sums<M>(sums, warp_groups(rows.count), exchange);
  cluster_barrier();
  if (p.partials) {
    for (int32_t i = threadIdx.x; i < rows.count * kTileKeys<M> / 4; i += kScoreThreads) {
      const int32_t row = i / (kTileKeys<M> / 4), piece = i % (kTileKeys<M> / 4) * 4;
      store_pack(partial_at<M>(p, index, split, rows.base + row) + piece,
                 load_pack<float, 4>(exchange + row * kScorePitch<M> + piece));
    }
  } else {
    const unsigned blocks = 1u << p.split_bits;
    const float* exchanged[kScoreCluster];
#pragma unroll
    for (unsigned rank = 0; rank < kScoreCluster; ++rank)
      exchanged[rank] = cluster_shared(exchange, rank < blocks ? rank : 0);
    add_share<M>(
        p, b, tile, rows, shared.places.mask, Share<M>(p.split_bits), shared.columns, [&](int32_t row, int32_t key) {
          Pack<float, 4> parts[kScoreCluster];  // loads in flight together
#pragma unroll
          for (unsigned rank = 0; rank < kScoreCluster; ++rank)
            parts[rank] =
                rank < blocks ? load_pack<float, 4>(exchanged[rank] + row * kScorePitch<M> + key) : Pack<float, 4>{};
#pragma unroll
          for (unsigned rank = 1; rank < kScoreCluster; ++rank)
#pragma unroll
            for (int i = 0; i < 4; ++i) parts[0].at[i] += parts[rank].at[i];
          return parts[0];
        });
  }
  cluster_barrier_relaxed();  // the sums have been read
}

// The grid is at most as large as the device, so that a block processes tile after tile and finds the rows of a sequence
// once.
template <class T, int M, bool kGivenLse, bool kVector>
__global__ void __launch_bounds__(kScoreThreads, 1) score_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared<M>& shared = *reinterpret_cast<ScoreShared<M>*>(memory);
  launch_dependents();
  const int32_t split = static_cast<int32_t>(blockIdx.x) & ((1 << p.split_bits) - 1);
  const Heads<T> heads(p, split * p.heads >> p.split_bits, (split + 1) * p.heads >> p.split_bits);
  Rows rows;
  int32_t b = 0;
  for (int32_t number = blockIdx.x >> p.split_bits;; number += gridDim.x >> p.split_bits) {
    for (; number >= p.tiles; number -= p.tiles) ++b;
    if (b >= p.batch) break;
    const Sequence s = sequence_at(p, b);
    if (number * kTileKeys<M> >= s.places) continue;
    const KeyTile tile = find_tile<M>(p, s, b, number, shared);
    if (tile.lowest <= tile.highest) {
      HeadCopies<T, M, kVector> copies(p, s, heads, shared);
      copies.start_keys();
      rows.start(s, b);
      wait_for_previous();  // the normalizers
      while (rows.advance(p, s, shared.rows)) {
        if (shared.rows.position[rows.count - 1] < tile.lowest) {  // no row attends to any of the keys
          __syncthreads();
          continue;
        }
        TileScores<M> sums{};
        sum_heads<kGivenLse>(p, s, b, rows, heads, copies, shared, sums);
        apply_causality<M>(tile, shared.rows.position, sums);
        combine_heads<M>(p, b, b * p.tiles + number, split, tile, rows, sums, shared);
        if (!rows.more()) break;
        __syncthreads();  // the next keys and rows overwrite these
        copies.start_keys();
      }
      copies_wait<0>();
    }
    if (!p.partials) write_columns<M>(p, s, tile, shared.places.mask, Share<M>(p.split_bits), shared.columns);
    __syncthreads();  // the next tile overwrites the shared memory
  }
  wait_for_previous();
}

// Adds the partial sums of the blocks of score_kernel that share a tile.
template <int M>
__global__ void __launch_bounds__(kScoreThreads, 1) score_finish_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  ScoreShared<M>& shared = *reinterpret_cast<ScoreShared<M>*>(memory);
  const int32_t index = blockIdx.x, b = index / p.tiles;
  const Sequence s = sequence_at(p, b);
  if (index % p.tiles * kTileKeys<M> >= s.places) return;
  const KeyTile tile = find_tile<M>(p, s, b, index % p.tiles, shared);
  const Share<M> share(0);
  Rows rows;
  rows.start(s, b);
  while (tile.lowest <= tile.highest && rows.advance(p, s, shared.rows)) {
    if (shared.rows.position[rows.count - 1] >= tile.lowest)
      add_share<M>(p, b, tile, rows, shared.places.mask, share, shared.columns, [&](int32_t row, int32_t key) {
        Pack<float, 4> sum{};
        for (int32_t split = 0; split < 1 << p.split_bits; ++split) {
          const Pack<float, 4> part = load_pack<float, 4>(partial_at<M>(p, index, split, rows.base + row) + key);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.at[i] += part.at[i];
        }
        return sum;
      });
    __syncthreads();
  }
  write_columns<M>(p, s, tile, shared.places.mask, share, shared.columns);
}

}  // namespace mustdrop
