// SPDX-License-Identifier: Apache-2.0
// text_vision_scores without matrix instructions: float32, which is multiplied in float32, and float16 and bfloat16 whose
// head size or strides do not suit 16-byte reads. The formulas are those of matrix_kernel.cuh.
//
// A thread has one key, a block 128 of them and up to 16 voting rows, of which it keeps a piece of the head dimension in
// shared memory at a time; all threads read the same element of it (a broadcast).
#pragma once

#include "attention_scores/sequence.cuh"

namespace mustdrop {

constexpr int kPlainKeys = kScoreThreads;
constexpr int kPlainRows = 16;
constexpr int kPlainDims = 64;  // of the head dimension, at a time
constexpr int kPlainPitch = kPlainRows + 1;

struct PlainShared {
  float query[kPlainDims][kPlainRows];
  float normaliser[kPlainRows];
  int32_t position[kPlainRows];
  int32_t list[kPlainRows + kScan];
  int32_t scratch[kScoreWarps];
  float sums[kPlainKeys * kPlainPitch];
  MaximumAndSum parts[kScoreWarps][kPlainRows];
};

// logits[r] = q[list[r]] . k[offset] of one head (V > 1: the key's elements are next to each other); every thread takes part, those without a key get zeros.
template <class T, int V>
__device__ __forceinline__ void plain_logits(const ScoreParameters& p, const ScoreSequence& s, const int32_t* list, int rows, int h,
                                             int64_t offset, float (&query)[kPlainDims][kPlainRows], float (&logits)[kPlainRows]) {
  const T* q = static_cast<const T*>(p.q) + h * p.q_head;
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) logits[r] = 0.0f;
  for (int first = 0; first < p.dim; first += kPlainDims) {
    const int dims = p.dim - first < kPlainDims ? p.dim - first : kPlainDims;
    __syncthreads();  // the last piece is no longer read
    for (int i = threadIdx.x; i < kPlainRows * kPlainDims; i += kScoreThreads) {
      const int r = i / kPlainDims, d = i % kPlainDims;
      query[d][r] = r < rows && d < dims ? to_float(q[row_offset(p, s, list[r]) + first + d]) : 0.0f;
    }
    __syncthreads();
    if (offset < 0) continue;
    const T* k = static_cast<const T*>(p.k) + offset + h / (p.heads / p.key_heads) * p.k_head;
    for (int d = 0; d < dims; d += V) {
      const Pack<T, V> piece = load_pack<T, V>(k + (first + d) * p.k_element);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float value = to_float(piece.at[i]);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) logits[r] += value * query[d + i][r];
      }
    }
  }
}

__device__ __forceinline__ void place_rows(PlainShared& shared, const ScoreSequence& s, const int32_t* list, int rows) {
  if (threadIdx.x < kPlainRows)
    shared.position[threadIdx.x] =
        static_cast<int>(threadIdx.x) < rows ? static_cast<int32_t>(s.k_len - s.q_len + list[threadIdx.x]) : -1;
}

template <class T, int V>
__global__ void __launch_bounds__(kScoreThreads) score_plain_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  PlainShared& shared = *reinterpret_cast<PlainShared*>(memory);
  const ScoreSequence s = sequence_at(p, blockIdx.y);
  const int64_t first_key = int64_t(blockIdx.x / cluster_size()) * kPlainKeys, j = first_key + threadIdx.x;
  const int64_t offset = type_at(p, s, j) == 2 ? key_offset(p, s, j) : -1;
  const HeadRange heads(p);
  const float factor = p.scale * kLog2E;
  KeyShare<kPlainKeys> share;
  RowFeed feed{shared.list, shared.scratch, 0, 0, 0};
  int64_t written = 0;
  for (;;) {
    const int rows = next_rows<kPlainRows>(p, s, feed);
    if (rows == 0) break;
    const int32_t* list = shared.list + feed.first;
    place_rows(shared, s, list, rows);
    float sum[kPlainRows] = {}, logits[kPlainRows];
    for (int h = heads.begin; h < heads.end; ++h) {
      __syncthreads();  // the last head's normalisers are no longer read
      if (threadIdx.x < kPlainRows)
        shared.normaliser[threadIdx.x] =
            static_cast<int>(threadIdx.x) < rows ? row_normaliser(p, s, h, list[threadIdx.x]) : infinity();
      plain_logits<T, V>(p, s, list, rows, h, offset, shared.query, logits);
      if (p.dim == 0) __syncthreads();
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
        const bool seen = j <= shared.position[r] && shared.normaliser[r] != infinity();
        sum[r] += seen ? fast_exp2(logits[r] * factor - shared.normaliser[r]) : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) shared.sums[threadIdx.x * kPlainPitch + r] = sum[r];
    cluster_barrier();
    reduce_heads<kPlainKeys>(p, s, share, shared.sums, kPlainPitch, rows, written, first_key);
    cluster_barrier();
    feed.first += rows;
    written += rows;
  }
  write_scores<kPlainKeys>(p, s, share, first_key);
}

// Maximum and sum of the visible logits of a part of the keys, for every voting row of one head.
template <class T, int V>
__global__ void __launch_bounds__(kScoreThreads) normaliser_plain_kernel(const __grid_constant__ ScoreParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  PlainShared& shared = *reinterpret_cast<PlainShared*>(memory);
  const int split = static_cast<int>(blockIdx.x), h = static_cast<int>(blockIdx.y);
  const ScoreSequence s = sequence_at(p, blockIdx.z);
  const float factor = p.scale * kLog2E;
  const int64_t part = ceil_div(ceil_div(p.keys, p.splits), kPlainKeys) * kPlainKeys;
  RowFeed feed{shared.list, shared.scratch, 0, 0, 0};
  for (;;) {
    const int rows = next_rows<kPlainRows>(p, s, feed);
    if (rows == 0) return;
    const int32_t* list = shared.list + feed.first;
    place_rows(shared, s, list, rows);
    __syncthreads();
    float most[kPlainRows], sum[kPlainRows] = {}, logits[kPlainRows];
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) most[r] = kLowest;
    const int64_t end = clamp_to((split + 1) * part, 0, shared.position[rows - 1] + 1);  // nobody sees what is behind the last row
    for (int64_t first = split * part; first < end; first += kPlainKeys) {
      const int64_t j = first + threadIdx.x;
      const int64_t offset = type_at(p, s, j) != 0 ? key_offset(p, s, j) : -1;
      plain_logits<T, V>(p, s, list, rows, h, offset, shared.query, logits);
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r)
        add_logit(most[r], sum[r], offset >= 0 && j <= shared.position[r] ? logits[r] * factor : -infinity());
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      for (int delta = 16; delta > 0; delta /= 2)
        merge_logits(most[r], sum[r], __shfl_xor_sync(kFullMask, most[r], delta), __shfl_xor_sync(kFullMask, sum[r], delta));
      if (lane_id() == 0) shared.parts[warp_id()][r] = {most[r], sum[r]};
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      MaximumAndSum all = shared.parts[0][threadIdx.x];
      for (int w = 1; w < kScoreWarps; ++w)
        merge_logits(all.most, all.sum, shared.parts[w][threadIdx.x].most, shared.parts[w][threadIdx.x].sum);
      partial_at(p, h, split)[partial_row(p, s, list[threadIdx.x])] = all;
    }
    __syncthreads();
    feed.first += rows;
  }
}

}  // namespace mustdrop
