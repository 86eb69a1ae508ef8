// SPDX-License-Identifier: Apache-2.0
// out[b, s] = mean over heads h of softmax over s < n of (scale * q[b, h] . k[b, h, s]), n = clamp(counts[b], 0, S); zero for
// s < prefix and s >= n.
//
// A block takes a few heads one after another and keeps their sum in shared memory; the blocks of an image form a cluster
// and add their sums over distributed shared memory in the order of the ranks. Without clusters the sums go through global
// memory and cls_mean_kernel adds them, in the same order.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kClsThreads = 256;
constexpr int kClsUnroll = 4;  // keys of a thread under way

struct ClsParameters {
  const void* q;          // [B, H, D]
  const void* k;          // [B, H, S, D]
  const int32_t* counts;  // [B] or null
  float* out;             // [B, S]
  float* partial;         // [B, groups, S], without clusters
  float* spill;           // [B, groups, 2, S], where S is too long for shared memory; else null
  int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, k_row_stride, count_stride;
  int64_t length, prefix;                 // S
  int32_t heads, dim, groups, per_group;  // heads of a block
  int32_t lanes_per_key;                  // a power of two
  float scale;
};

__device__ __forceinline__ int64_t cls_count(const ClsParameters& p, int64_t b) {
  return p.counts ? clamp_to(p.counts[b * p.count_stride], 0, p.length) : p.length;
}

// logits[s] = scale log2(e) q . k[s] for s < n. `query` [D] in shared memory.
template <class T, int V>
__device__ __forceinline__ void cls_logits(const ClsParameters& p, const T* k, const float* query, int64_t n, float* logits) {
  const int lane = static_cast<int>(threadIdx.x) % p.lanes_per_key, step = kClsThreads / p.lanes_per_key;
  const float factor = p.scale * kLog2E;
  for (int64_t first = threadIdx.x / p.lanes_per_key; first < ceil_div(n, step) * step; first += int64_t(kClsUnroll) * step) {
    float dot[kClsUnroll] = {};
    for (int d = lane * V; d < p.dim; d += p.lanes_per_key * V) {
      Pack<T, V> piece[kClsUnroll];
#pragma unroll
      for (int u = 0; u < kClsUnroll; ++u) {
        const int64_t s = first + int64_t(u) * step;
        piece[u] = s < n ? load_pack<T, V>(k + s * p.k_row_stride + d) : Pack<T, V>{};
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float value = query[d + i];
#pragma unroll
        for (int u = 0; u < kClsUnroll; ++u) dot[u] += value * to_float(piece[u].at[i]);
      }
    }
#pragma unroll
    for (int u = 0; u < kClsUnroll; ++u) {
      for (int delta = p.lanes_per_key / 2; delta > 0; delta /= 2) dot[u] += __shfl_xor_sync(kFullMask, dot[u], delta);
      const int64_t s = first + int64_t(u) * step;
      if (lane == 0 && s < n) logits[s] = dot[u] * factor;
    }
  }
}

// sum[s] += softmax(logits)[s]. A head whose logits are all -inf adds nothing.
__device__ __forceinline__ void cls_add_softmax(float* logits, float* sum, int64_t n, float* scratch) {
  float most = -infinity();
  for (int64_t s = threadIdx.x; s < n; s += kClsThreads) most = max_nan(most, logits[s]);
  most = block_max_nan(most, scratch);
  if (most == -infinity()) return;
  float norm = 0.0f;
  for (int64_t s = threadIdx.x; s < n; s += kClsThreads) {
    logits[s] = fast_exp2(logits[s] - most);
    norm += logits[s];
  }
  norm = 1.0f / block_sum(norm, scratch);
  for (int64_t s = threadIdx.x; s < n; s += kClsThreads) sum[s] += logits[s] * norm;
}

__device__ __forceinline__ void cls_write(const ClsParameters& p, int64_t b, int64_t s, int64_t n, float sum) {
  p.out[b * p.length + s] = s >= p.prefix && s < n ? sum / static_cast<float>(p.heads) : 0.0f;
}

template <class T, int V>
__global__ void __launch_bounds__(kClsThreads) cls_kernel(const __grid_constant__ ClsParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  float* scratch = reinterpret_cast<float*>(memory);        // [kWarp]
  float* query = scratch + kWarp;                            // [D]
  float* logits = p.spill ? p.spill + int64_t(blockIdx.x) * 2 * p.length : query + p.dim;  // [S]
  float* sum = logits + p.length;                            // [S]
  const int64_t b = blockIdx.x / p.groups, n = cls_count(p, b);
  const int group = static_cast<int>(blockIdx.x % p.groups), first = group * p.per_group;
  for (int64_t s = threadIdx.x; s < p.length; s += kClsThreads) sum[s] = 0.0f;
  for (int h = first; h < first + p.per_group && h < p.heads; ++h) {
    __syncthreads();
    const T* q = static_cast<const T*>(p.q) + b * p.q_batch_stride + h * p.q_head_stride;
    for (int d = threadIdx.x; d < p.dim; d += kClsThreads) query[d] = to_float(q[d]);
    __syncthreads();
    cls_logits<T, V>(p, static_cast<const T*>(p.k) + b * p.k_batch_stride + h * p.k_head_stride, query, n, logits);
    __syncthreads();
    cls_add_softmax(logits, sum, n, scratch);
  }
  if (p.partial) {
    float* partial = p.partial + int64_t(blockIdx.x) * p.length;
    for (int64_t s = threadIdx.x; s < p.length; s += kClsThreads) partial[s] = sum[s];
    return;
  }
  cluster_barrier();
  for (int64_t s = group * kClsThreads + threadIdx.x; s < p.length; s += int64_t(p.groups) * kClsThreads) {
    float all = 0.0f;
    for (int rank = 0; rank < p.groups; ++rank) all += cluster_shared(sum, rank)[s];
    cls_write(p, b, s, n, all);
  }
  cluster_barrier();  // no block leaves while another reads its sums
}

static __global__ void __launch_bounds__(kClsThreads) cls_mean_kernel(const __grid_constant__ ClsParameters p) {
  const int64_t b = blockIdx.y, s = blockIdx.x * int64_t(kClsThreads) + threadIdx.x;
  if (s >= p.length) return;
  float all = 0.0f;
  for (int group = 0; group < p.groups; ++group) all += p.partial[(b * p.groups + group) * p.length + s];
  cls_write(p, b, s, cls_count(p, b), all);
}

}  // namespace mustdrop
