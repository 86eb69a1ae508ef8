// SPDX-License-Identifier: Apache-2.0
// out[b, i] = x[b, keep[b, i]] for i < n, n = clamp(counts[b], 0, K); zero elsewhere and where keep[b, i] is not in [0,
// L). With align_end the n tokens come last: out[b, K - n + i].
//
// A token is `outer` rows of `run` bytes, moved in pieces of sizeof(Piece) bytes. A group of threads (a power of two)
// copies a token; each thread issues several loads before its first store.
#pragma once

#include "common/device.cuh"

namespace mustdrop {

constexpr int kGatherThreads = 256;
constexpr int kGatherOuterDims = 4;

struct GatherParameters {
  const char* x;                           // [B, L, outer..., run bytes]
  const int64_t* keep;                     // [B, K]
  const int32_t* counts;                   // [B]
  char* out;                               // [B, K, outer..., run bytes], packed
  int64_t length, capacity, tokens;        // L, K, B K
  int64_t batch_stride, row_stride;        // of x, in bytes
  int64_t keep_stride, count_stride;       // in elements
  int64_t outer_size[kGatherOuterDims];    // trailing dimensions but the contiguous run, last first
  int64_t outer_stride[kGatherOuterDims];  // in bytes
  int64_t run, pieces;                     // bytes of a run; pieces of a token
  int group;                               // threads of a token
  bool align_end;
};

// Offset in x, from the token's start, of byte `offset` of the packed token.
__device__ __forceinline__ int64_t gather_offset(const GatherParameters& p, int64_t offset) {
  int64_t row = offset / p.run, result = offset % p.run;
#pragma unroll
  for (int d = 0; d < kGatherOuterDims; ++d) {
    result += row % p.outer_size[d] * p.outer_stride[d];
    row /= p.outer_size[d];
  }
  return result;
}

// The source token of slot (b, slot), -1 for zeros.
__device__ __forceinline__ int64_t gather_source(const GatherParameters& p, int64_t b, int64_t slot) {
  const int64_t n = clamp_to(p.counts[b * p.count_stride], 0, p.capacity);
  const int64_t entry = p.align_end ? slot - (p.capacity - n) : slot;
  if (entry < 0 || entry >= n) return -1;
  const int64_t index = p.keep[b * p.keep_stride + entry];
  return index >= 0 && index < p.length ? index : -1;
}

template <class Piece, bool kOneRun>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ GatherParameters p) {
  constexpr int kUnroll = 4;
  const int64_t token = blockIdx.x * int64_t(kGatherThreads / p.group) + threadIdx.x / p.group;
  if (token >= p.tokens) return;
  const int64_t b = token / p.capacity, source = gather_source(p, b, token % p.capacity);
  const char* from = p.x + b * p.batch_stride + source * p.row_stride;
  Piece* to = reinterpret_cast<Piece*>(p.out) + token * p.pieces;
  for (int64_t piece = threadIdx.x % p.group; piece < p.pieces; piece += kUnroll * p.group) {
    Piece held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = piece + u * p.group;
      held[u] = Piece{};
      if (source < 0 || at >= p.pieces) continue;
      const int64_t offset = at * int64_t(sizeof(Piece));
      held[u] = *reinterpret_cast<const Piece*>(from + (kOneRun ? offset : gather_offset(p, offset)));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = piece + u * p.group;
      if (at < p.pieces) to[at] = held[u];
    }
  }
}

}  // namespace mustdrop
