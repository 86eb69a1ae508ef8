// SPDX-License-Identifier: Apache-2.0
// Attention of the CLS token to each token: out[j] = sum over h of softmax_j(scale q[h] k[h, j]) / H over the first
// `counts` tokens, zero for the prefix and the padding.
//
// A block processes some heads of one image (split): it reads their keys once, holds one head's scores, and sums over
// the heads. As many lanes read a key as it has 16-byte pieces, so a warp's loads are contiguous. Then the blocks of a
// cluster read each other's sums in a fixed order, each for its own tokens; without clusters, or if the tokens do not
// fit into shared memory, the sums go through a workspace to cls_finish_kernel.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kClsThreads = 512;
constexpr int kClsCluster = kMostCluster;
constexpr int kClsKeys = 5;  // loads in flight of a group of lanes; two rounds are 640 keys of 128 bytes

struct ClsParameters {
  const void* q;          // [B, H, D]
  const void* k;          // [B, H, S, D]
  const int32_t* counts;  // [B] or null
  float* out;             // [B, S]
  float* partials;        // [B, splits, S], workspace; null: the blocks of a cluster are summed in the kernel
  float* scores;          // [B, splits, S], workspace; null: scores and sums are in shared memory
  int64_t q_batch, q_head, k_batch, k_head, k_row, count_stride;  // in elements
  int32_t batch, heads, span, dim, prefix, splits;
  int32_t pieces, lanes;         // loads of a key, and the lanes that share them
  int32_t groups;                // keys that a block reads together
  float scale_log2, head_share;  // scale * log2(e), 1 / H
};

// [2, warps] of scratch, the query, then the scores and the sums if they fit.
__host__ __device__ inline int64_t cls_shared_bytes(int64_t dim, int64_t span) {
  return (2 * kClsThreads / static_cast<int64_t>(kWarp) + ceil_div(dim, 8) * 8 + 2 * span) *
         static_cast<int64_t>(sizeof(float));
}

__device__ __forceinline__ int32_t cls_count(const ClsParameters& p, int32_t b) {
  return p.counts ? static_cast<int32_t>(clamp_to(p.counts[b * p.count_stride], 0, p.span)) : p.span;
}

// scores[j] = q k[j] in log2 for the first `count` keys; returns the largest that this thread wrote.
template <class T, int V>
__device__ __forceinline__ float cls_scores(const ClsParameters& p,
                                            const T* k,      // [S, D], one head's
                                            const float* q,  // [D]
                                            int32_t count,
                                            float* scores) {  // [S]
  const int32_t lane = static_cast<int32_t>(lane_id()) % p.lanes, group = static_cast<int32_t>(threadIdx.x) / p.lanes;
  float largest = -infinity();
#pragma unroll 1
  for (int32_t round = 0; round < count; round += p.groups * kClsKeys) {
    const int32_t first = round + group;
    float sums[kClsKeys] = {};
#pragma unroll 1
    for (int32_t piece = lane; piece < p.pieces; piece += p.lanes) {
      const T* from = k + piece * V;
      Pack<T, V> key[kClsKeys];
#pragma unroll
      for (int i = 0; i < kClsKeys; ++i) {
        const int32_t j = first + i * p.groups;
        key[i] = load_pack<T, V>(from + (j < count ? j : count - 1) * p.k_row);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float element = q[piece * V + v];
#pragma unroll
        for (int i = 0; i < kClsKeys; ++i) sums[i] = fmaf(to_float(key[i].at[v]), element, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kClsKeys; ++i) {
      const int32_t j = first + i * p.groups;
      for (int32_t delta = p.lanes / 2; delta > 0; delta /= 2) sums[i] += __shfl_xor_sync(kFullMask, sums[i], delta);
      if (lane > 0 || j >= count) continue;
      scores[j] = sums[i] * p.scale_log2;
      largest = fmaxf(largest, scores[j]);
    }
  }
  return largest;
}

__device__ __forceinline__ float cls_largest(float value, float* scratch) {  // [warps]; over the block, ignoring NaN
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value = fmaxf(value, __shfl_xor_sync(kFullMask, value, delta));
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  for (unsigned w = 0; w < warps_in_block(); ++w) value = fmaxf(value, scratch[w]);
  return value;
}

template <class T, int V>
__global__ void __launch_bounds__(kClsThreads, 2) cls_kernel(const __grid_constant__ ClsParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  float* scratch = reinterpret_cast<float*>(memory);                   // [2, warps]
  float* query = scratch + 2 * kClsThreads / static_cast<int>(kWarp);  // [D]
  float* scores = query + ceil_div(p.dim, 8) * 8;                      // [S]
  float* sums = scores + p.span;                                       // [S]
  const int32_t b = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  if (p.scores) scores = p.scores + int64_t(blockIdx.x) * p.span;
  if (p.partials) sums = p.partials + int64_t(blockIdx.x) * p.span;
  const int32_t count = cls_count(p, b);
  const int32_t begin = split * p.heads / p.splits, end = (split + 1) * p.heads / p.splits;

  for (int32_t head = begin; head < end; ++head) {
    const T* q = static_cast<const T*>(p.q) + b * p.q_batch + head * p.q_head;
    for (int32_t d = threadIdx.x; d < p.dim; d += kClsThreads) query[d] = to_float(q[d]);
    __syncthreads();
    const T* k = static_cast<const T*>(p.k) + b * p.k_batch + head * p.k_head;
    // Finite: infinities must not be subtracted.
    const float largest = fmaxf(
        fminf(cls_largest(cls_scores<T, V>(p, k, query, count, scores), scratch), 3.402823466e+38f), -3.402823466e+38f);
    float sum = 0.0f;  // the barrier in cls_largest made the scores visible
    for (int32_t j = threadIdx.x; j < count; j += kClsThreads) {
      scores[j] = fast_exp2(scores[j] - largest);
      sum += scores[j];
    }
    sum = block_sum(sum, scratch + kClsThreads / static_cast<int>(kWarp));
    const float factor = sum == 0.0f ? 0.0f : p.head_share / sum;
    for (int32_t j = threadIdx.x; j < count; j += kClsThreads) {
      const float share = scores[j] * factor;
      sums[j] = head == begin ? share : sums[j] + share;
    }
  }
  if (p.partials) return;
  cluster_barrier();
  for (int32_t j = static_cast<int32_t>(cluster_rank()) * kClsThreads + static_cast<int32_t>(threadIdx.x); j < p.span;
       j += static_cast<int32_t>(cluster_size()) * kClsThreads) {
    float total = 0.0f;
    if (j >= p.prefix && j < count) {
      float parts[kClsCluster];  // loads in flight together
#pragma unroll
      for (unsigned rank = 0; rank < kClsCluster; ++rank)
        parts[rank] = rank < cluster_size() ? cluster_shared(sums, rank)[j] : 0.0f;
#pragma unroll
      for (unsigned rank = 0; rank < kClsCluster; ++rank) total += parts[rank];
    }
    p.out[int64_t(b) * p.span + j] = total;
  }
  cluster_barrier_relaxed();  // blocks must not exit while their shared memory is read
}

// Adds the partial sums of the blocks of cls_kernel.
__global__ void __launch_bounds__(kClsThreads) cls_finish_kernel(const __grid_constant__ ClsParameters p) {
  const int32_t parts = (p.span + kClsThreads - 1) / kClsThreads, b = blockIdx.x / parts;
  const int32_t j = blockIdx.x % parts * kClsThreads + static_cast<int32_t>(threadIdx.x);
  if (j >= p.span) return;
  float total = 0.0f;
  if (j >= p.prefix && j < cls_count(p, b))
    for (int32_t split = 0; split < p.splits; ++split)
      total += p.partials[(int64_t(b) * p.splits + split) * p.span + j];
  p.out[int64_t(b) * p.span + j] = total;
}

}  // namespace mustdrop
