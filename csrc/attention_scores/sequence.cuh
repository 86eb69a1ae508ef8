// SPDX-License-Identifier: Apache-2.0
// What the text-to-vision scoring kernels share: where the rows, keys and types of a sequence are (dense, packed or paged),
// which rows vote, and the sum over heads and rows.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kScoreThreads = 128;
constexpr int kScoreWarps = kScoreThreads / kWarp;
constexpr int kScanPerThread = 8;                               // rows that a thread looks at together
constexpr int kScan = kScoreThreads * kScanPerThread;

constexpr float kLowest = -1e30f;  // a maximum of nothing: finite, so that differences are

struct MaximumAndSum {
  float most, sum;
};

struct ScoreParameters {
  const void* q;               // [B, Hq, Lq, D], or packed [total_q, Hq, D]
  const void* k;               // [B, Hk, Lk, D], packed [total_k, Hk, D], or paged [blocks, slots, Hk, D]
  const uint8_t* types;        // [B, Lk], packed [total_k], or [B, max_len]
  const float* lse;            // [B, Hq, Lq], or packed [Hq, total_q], natural log; null: `partial` has it
  MaximumAndSum* partial;           // [Hq, splits, rows]: maximum and sum of a part of the keys, base 2
  const int32_t* cu_q;         // [B+1], or null
  const int32_t* cu_k;         // [B+1], or null
  const int32_t* block_table;  // [B, max_blocks], or null
  const int32_t* seq_lens;     // [B], with a block table
  float* total;                // [B, Lk], packed [total_k], or [B, max_len]; null: only the map
  float* peak;                 // likewise
  float* map;                  // [B, max_query, Lk], or null
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, k_element, type_batch, lse_batch, lse_head, lse_row, table_batch;  // strides
  int64_t total_q, total_k, rows, keys;  // rows, keys: the most that a sequence has
  int64_t out_keys;                      // columns of the results of a sequence
  int64_t slots, blocks;
  int64_t partial_rows;                  // of all sequences: B Lq, or total_q
  int64_t max_query;
  int32_t heads, key_heads, dim, splits;
  float scale;
};

struct ScoreSequence {
  int64_t b, q_begin, k_begin, q_len, k_len;
};

__device__ __forceinline__ ScoreSequence sequence_at(const ScoreParameters& p, int64_t b) {
  ScoreSequence s{b, 0, 0, p.rows, p.keys};
  if (p.cu_q) {
    s.q_begin = clamp_to(p.cu_q[b], 0, p.total_q);
    s.q_len = clamp_to(clamp_to(p.cu_q[b + 1], 0, p.total_q) - s.q_begin, 0, p.rows);
  }
  if (p.cu_k) {
    s.k_begin = clamp_to(p.cu_k[b], 0, p.total_k);
    s.k_len = clamp_to(clamp_to(p.cu_k[b + 1], 0, p.total_k) - s.k_begin, 0, p.keys);
  }
  if (p.seq_lens) s.k_len = clamp_to(p.seq_lens[b], 0, p.keys);
  return s;
}

// Offset in elements of key j of head 0, -1 where there is none.
__device__ __forceinline__ int64_t key_offset(const ScoreParameters& p, const ScoreSequence& s, int64_t j) {
  if (j >= s.k_len) return -1;
  if (!p.block_table) return (p.cu_k ? 0 : s.b * p.k_batch) + (s.k_begin + j) * p.k_row;
  const int64_t block = p.block_table[s.b * p.table_batch + j / p.slots];
  return block < 0 || block >= p.blocks ? -1 : block * p.k_batch + j % p.slots * p.k_row;
}

// The type of position j, padding where there is no key.
__device__ __forceinline__ int type_at(const ScoreParameters& p, const ScoreSequence& s, int64_t j) {
  if (key_offset(p, s, j) < 0) return 0;
  return p.types[s.b * p.type_batch + s.k_begin + j];
}

__device__ __forceinline__ int64_t row_offset(const ScoreParameters& p, const ScoreSequence& s, int64_t row) {
  return (p.cu_q ? 0 : s.b * p.q_batch) + (s.q_begin + row) * p.q_row;
}

// The place of a row in `partial`.
__device__ __forceinline__ int64_t partial_row(const ScoreParameters& p, const ScoreSequence& s, int64_t row) {
  return (p.cu_q ? 0 : s.b * p.rows) + s.q_begin + row;
}

__device__ __forceinline__ MaximumAndSum* partial_at(const ScoreParameters& p, int h, int split) {
  return p.partial + (int64_t(h) * p.splits + split) * p.partial_rows;
}

// log2 of the sum of exponentials of a row; +inf where the row sees nothing, which makes its probabilities 0.
__device__ __forceinline__ float row_normaliser(const ScoreParameters& p, const ScoreSequence& s, int h, int64_t row) {
  if (p.lse) {
    const float lse = p.lse[(p.cu_q ? 0 : s.b * p.lse_batch) + h * p.lse_head + (s.q_begin + row) * p.lse_row];
    return lse == -infinity() ? infinity() : lse * kLog2E;
  }
  float most = kLowest, sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) most = max_nan(most, partial_at(p, h, split)[partial_row(p, s, row)].most);
  for (int split = 0; split < p.splits; ++split) {
    const MaximumAndSum part = partial_at(p, h, split)[partial_row(p, s, row)];
    sum += part.sum * fast_exp2(part.most - most);
  }
  return sum == 0.0f ? infinity() : most + log2f(sum);
}

// Hands out the rows that vote, in order, a tile at a time. All threads of a block call it together.
struct RowFeed {
  int32_t* list;     // [tile + kScan]
  int32_t* scratch;  // [kScoreWarps]
  int64_t next;      // first row that has not been looked at
  int32_t first, have;  // list[first .. have) waits
};

template <int kTile>
__device__ __forceinline__ int32_t next_rows(const ScoreParameters& p, const ScoreSequence& s, RowFeed& feed) {
  static_assert(kTile <= kScoreThreads, "a thread moves one waiting row");
  const int32_t left = feed.have - feed.first;
  if (left < kTile && feed.first > 0) {
    const int32_t row = static_cast<int32_t>(threadIdx.x) < left ? feed.list[feed.first + threadIdx.x] : 0;
    __syncthreads();
    if (static_cast<int32_t>(threadIdx.x) < left) feed.list[threadIdx.x] = row;
    feed.first = 0;
    feed.have = left;
    __syncthreads();
  }
  const int64_t offset = s.k_len - s.q_len;
  while (feed.have < kTile && feed.next < s.q_len) {
    unsigned votes[kScanPerThread];
    int32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kScanPerThread; ++i) {
      const int64_t row = feed.next + (warp_id() * kScanPerThread + i) * kWarp + lane_id();
      votes[i] = __ballot_sync(kFullMask, row < s.q_len && offset + row >= 0 && type_at(p, s, offset + row) == 3);
      mine += __popc(votes[i]);
    }
    if (lane_id() == 0) feed.scratch[warp_id()] = mine;
    __syncthreads();
    int32_t place = feed.have, total = 0;
    for (unsigned w = 0; w < kScoreWarps; ++w) {
      place += w < warp_id() ? feed.scratch[w] : 0;
      total += feed.scratch[w];
    }
#pragma unroll
    for (int i = 0; i < kScanPerThread; ++i) {
      if (votes[i] >> lane_id() & 1)
        feed.list[place + __popc(votes[i] & ((1u << lane_id()) - 1))] =
            static_cast<int32_t>(feed.next + (warp_id() * kScanPerThread + i) * kWarp + lane_id());
      place += __popc(votes[i]);
    }
    feed.have += total;
    feed.next += kScan;
    __syncthreads();
  }
  const int32_t rows = feed.have - feed.first;
  return rows < kTile ? rows : kTile;
}

// The keys of a block whose results this block of the cluster writes: a few neighbouring threads share a key.
template <int kKeys>
struct KeyShare {
  int key, lane, lanes;     // key of the tile; place among the threads that share it, and their number
  float total = 0.0f, peak = 0.0f;

  __device__ __forceinline__ KeyShare() {
    const int own = kKeys / static_cast<int>(cluster_size());
    lanes = kScoreThreads / own;
    key = static_cast<int>(cluster_rank()) * own + static_cast<int>(threadIdx.x) / lanes;
    lane = static_cast<int>(threadIdx.x) % lanes;
  }
};

// Adds the head sums of all blocks of the cluster, in the order of the ranks, and goes over `rows` rows of a tile.
// `sums` [kKeys, pitch] in shared memory, complete after the cluster's barrier. `written`: rows before this tile.
template <int kKeys>
__device__ __forceinline__ void reduce_heads(const ScoreParameters& p, const ScoreSequence& s, KeyShare<kKeys>& share,
                                             float* sums, int pitch, int rows, int64_t written, int64_t first_key) {
  const int64_t j = first_key + share.key;
  const bool vision = type_at(p, s, j) == 2;
  for (int r = share.lane; r < rows; r += share.lanes) {
    float value = 0.0f;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) value += cluster_shared(sums, rank)[share.key * pitch + r];
    value /= static_cast<float>(p.heads);
    share.total += value;
    share.peak = max_nan(share.peak, value);
    if (p.map && vision && written + r < p.max_query) p.map[(s.b * p.max_query + written + r) * p.out_keys + j] = value;
  }
}

template <int kKeys>
__device__ __forceinline__ void write_scores(const ScoreParameters& p, const ScoreSequence& s, KeyShare<kKeys>& share,
                                             int64_t first_key) {
  for (int delta = share.lanes / 2; delta > 0; delta /= 2) {
    share.total += __shfl_xor_sync(kFullMask, share.total, delta);
    share.peak = max_nan(share.peak, __shfl_xor_sync(kFullMask, share.peak, delta));
  }
  const int64_t j = first_key + share.key;
  if (!p.total || share.lane != 0 || j >= (p.cu_k ? s.k_len : p.out_keys)) return;
  const int64_t at = (p.cu_k ? s.k_begin : s.b * p.out_keys) + j;
  const bool vision = type_at(p, s, j) == 2;
  p.total[at] = vision ? share.total : 0.0f;
  p.peak[at] = vision ? share.peak : 0.0f;
}

// Heads [begin, end) of this block of the cluster.
struct HeadRange {
  int begin, end;
  __device__ __forceinline__ explicit HeadRange(const ScoreParameters& p) {
    const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
    begin = p.heads * rank / blocks;
    end = p.heads * (rank + 1) / blocks;
  }
};

// One more logit (base 2) in a running maximum and sum.
__device__ __forceinline__ void add_logit(float& most, float& sum, float logit) {
  const float distance = logit - most, e = fast_exp2(distance > 0.0f ? -distance : distance);
  sum = distance > 0.0f ? sum * e + 1.0f : sum + e;
  most = distance > 0.0f ? logit : most;
}

__device__ __forceinline__ void merge_logits(float& most, float& sum, float other_most, float other_sum) {
  const float top = other_most > most ? other_most : most;
  sum = sum * fast_exp2(most - top) + other_sum * fast_exp2(other_most - top);
  most = top;
}

}  // namespace mustdrop
