// SPDX-License-Identifier: Apache-2.0
// Merges windows of similar tokens of the grid into one token each. With u = x / max(|x|, 1e-8) and n tokens in the
// window:
//   similarity = (|sum u|^2 - sum |u|^2) / (n (n - 1)),   merged = sum(s_i x_i) / sum(s_i).
// A window merges iff similarity >= threshold; with a budget r the r most similar merge; with `uniform` r is the
// smallest number over the batch. Rows: a merged window takes the place of its first token, or precedes all tokens by
// descending similarity.
//
// Two implementations with equal arithmetic:
// - merge_cluster_kernel: a cluster of blocks holds an image in shared memory, with a warp per window. One launch, x is
//   read once: similarities are sent to all blocks of the cluster; each block assigns all rows redundantly and writes
//   its windows.
// - two launches without clusters, for images that do not fit, or with `uniform`: similarities; then each block assigns
//   all rows of its image redundantly and writes a part of them. Four launches for images with many windows.
#pragma once

#include "common/device.cuh"

#define MUSTDROP_NORM_FUNCTION __device__ __forceinline__
#include "spatial_merge/norms.h"

namespace mustdrop {

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / kWarp;

enum class MergeRule : int32_t { threshold, budget, uniform };

struct MergeParameters {
  const void* x;                                  // [B, P+N, C]
  const float* sizes;                             // [B, P+N], or null: ones
  void* tokens;                                   // [B, capacity, C]
  int32_t* counts;                                // [B]
  int64_t* assignment;                            // [B, P+N]
  float* out_sizes;                               // [B, capacity]
  float* similarity;                              // [B, W]
  float* inverse;                                 // [B, W, members]: TokenUnit::weight
  int32_t* rank;                                  // [B, W]: rank among the candidates, by descending similarity
  int32_t* window_row;                            // [B, W]: row of a merged window, -1 if it does not merge
  int32_t* row;                                   // [B, N]: row of a token that does not merge
  int64_t batch_stride, row_stride, size_stride;  // in elements
  int32_t grid[3], window[3], windows[3];         // T, H, W; windows along each axis
  int32_t batch, channels, prefix, patches, window_count, capacity, budget;
  int32_t window_size;  // n of a complete window
  int32_t members;      // largest n of this grid's windows
  int32_t parts;        // blocks per image, in the second of two launches
  float threshold;
  MergeRule rule;
  bool merged_first;
};

// A window's tokens, in raster order; the border may cut it.
struct MergeWindow {
  int32_t start[3], extent[3], count;
};

__device__ __forceinline__ MergeWindow window_at(const MergeParameters& p, int32_t index) {
  MergeWindow w;
  w.count = 1;
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    w.start[d] = index % p.windows[d] * p.window[d];
    index /= p.windows[d];
    const int32_t left = p.grid[d] - w.start[d];
    w.extent[d] = left < p.window[d] ? left : p.window[d];
    w.count *= w.extent[d];
  }
  return w;
}

// The members of a window in order, without a division each.
struct MergeMember {
  int32_t m, patch, column, row;

  __device__ __forceinline__ static MergeMember first(const MergeParameters& p, const MergeWindow& w) {
    return {0, (w.start[0] * p.grid[1] + w.start[1]) * p.grid[2] + w.start[2], 0, 0};
  }

  __device__ __forceinline__ void next(const MergeParameters& p, const MergeWindow& w) {
    ++m, ++patch;
    if (++column < w.extent[2]) return;
    column = 0;
    patch += p.grid[2] - w.extent[2];
    if (++row < w.extent[1]) return;
    row = 0;
    patch += (p.grid[1] - w.extent[1]) * p.grid[2];
  }
};

__device__ __forceinline__ int32_t window_of(const MergeParameters& p, int32_t patch) {
  const int32_t c = patch % p.grid[2], r = patch / p.grid[2] % p.grid[1], t = patch / p.grid[2] / p.grid[1];
  return (t / p.window[0] * p.windows[1] + r / p.window[1]) * p.windows[2] + c / p.window[2];
}

// The tokens of a warp's window: in global memory, or contiguous in shared memory.
template <class T>
struct MergeTokens {
  const T* base;   // of the image's first patch, or of the window's first token
  int64_t stride;  // between patches, or between members
  bool in_shared;

  __device__ __forceinline__ const T* at(const MergeMember& member) const {
    return base + (in_shared ? member.m : member.patch) * stride;
  }
};

// |scale token|^2. Called by one warp.
template <class T, int V>
__device__ __forceinline__ float square_of(const T* token, int32_t channels, float scale) {
  float sum = 0.0f;
#pragma unroll 4
  for (int32_t c = lane_id() * V; c < channels; c += kWarp * V) {
    const Pack<T, V> piece = load_pack<T, V>(token + c);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += to_float(piece.at[i]) * scale * (to_float(piece.at[i]) * scale);
  }
  return warp_sum(sum);
}

// Called by one warp. Writes `inverse` [count].
template <class T, int V>
__device__ __forceinline__ float window_similarity(const MergeParameters& p, const MergeWindow& w,
                                                   const MergeTokens<T>& x, float* inverse) {
  float squares = 0.0f;
  for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
    const T* token = x.at(member);
    float square = square_of<T, V>(token, p.channels, 1.0f);
    const float scale = norm_scale(square);
    if (scale != 1.0f) square = square_of<T, V>(token, p.channels, scale);
    const TokenUnit unit = token_unit(square, scale);
    squares += unit.square;
    if (lane_id() == 0) inverse[member.m] = unit.weight;
  }
  __syncwarp();
  float total = 0.0f;
  for (int32_t c = lane_id() * V; c < p.channels; c += kWarp * V) {
    float sum[V] = {};
#pragma unroll 4
    for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
      const Pack<T, V> piece = load_pack<T, V>(x.at(member) + c);
      const float weight = inverse[member.m];
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += to_float(piece.at[i]) * weight;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += sum[i] / kUnit * (sum[i] / kUnit);
  }
  total = warp_sum(total);
  const float n = static_cast<float>(w.count);
  return (total - squares) / (n * (n - 1.0f));
}

// Candidates: windows that reach the threshold in the threshold rule, else complete windows.
__device__ __forceinline__ bool is_candidate(const MergeParameters& p, const float* similarity, int32_t index) {
  const int32_t count = window_at(p, index).count;
  if (count < 2) return false;
  return p.rule == MergeRule::threshold ? similarity[index] >= p.threshold : count == p.window_size;
}

// Number of candidates that precede window `index`; each of the `step` threads returns the part from `first` on.
__device__ __forceinline__ int32_t count_before(const MergeParameters& p, const float* similarity, int32_t index,
                                                int32_t first, int32_t step) {
  const uint32_t mine = ordered_key(similarity[index]);
  int32_t before = 0;
  for (int32_t other = first; other < p.window_count; other += step) {
    const uint32_t key = ordered_key(similarity[other]);
    if ((key > mine || (key == mine && other < index)) && is_candidate(p, similarity, other)) ++before;
  }
  return before;
}

// Decides which windows merge and assigns rows to the tokens and merged windows of one image. Called by one block.
// `most`: the number of windows that merge with a budget or `uniform`. Writes window_row [W] and row [N]; returns the
// number of rows, prefix included.
__device__ __forceinline__ int32_t assign_rows(const MergeParameters& p, const float* similarity, const int32_t* rank,
                                               int32_t most, int32_t* window_row, int32_t* row, int32_t* scratch) {
  int32_t mine = 0;
  for (int32_t w = threadIdx.x; w < p.window_count; w += kMergeThreads) {
    const bool merges = is_candidate(p, similarity, w) && (p.rule == MergeRule::threshold || rank[w] < most);
    window_row[w] = merges ? (p.merged_first ? p.prefix + rank[w] : 0) : -1;
    mine += merges;
  }
  const int32_t merged = block_sum(mine, scratch);  // its barriers make window_row visible
  int32_t base = p.prefix + (p.merged_first ? merged : 0);
  for (int32_t first = 0; first < p.patches; first += kMergeThreads) {
    const int32_t patch = first + static_cast<int32_t>(threadIdx.x);
    int32_t window = 0, total = 0;
    bool goes = false, heads = false;
    if (patch < p.patches) {
      window = window_of(p, patch);
      goes = window_row[window] >= 0;
      heads = goes && !p.merged_first && MergeMember::first(p, window_at(p, window)).patch == patch;
    }
    const int32_t stands = patch < p.patches && (!goes || heads);
    // Its barrier: all threads have read window_row.
    const int32_t place = base + block_exclusive_scan(stands, scratch, total);
    if (stands) (heads ? window_row[window] : row[patch]) = place;
    base += total;
    __syncthreads();  // the rows are written; window_row and scratch are reused
  }
  return base;
}

// Writes the rows of a window. Called by one warp.
template <class T, int V>
__device__ __forceinline__ void write_window(const MergeParameters& p, int64_t b, const MergeWindow& w,
                                             const MergeTokens<T>& x, int32_t merged_row, const int32_t* row) {
  T* tokens = static_cast<T*>(p.tokens) + b * p.capacity * p.channels;
  float* out_sizes = p.out_sizes + b * p.capacity;
  int64_t* assignment = p.assignment + b * (p.prefix + p.patches) + p.prefix;
  const float* sizes = p.sizes ? p.sizes + b * p.size_stride + p.prefix : nullptr;
  const auto weight = [&](int32_t patch) { return sizes ? sizes[patch] : 1.0f; };
  if (merged_row < 0) {
    for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
      const int32_t place = row[member.patch];
      if (lane_id() == 0) {
        assignment[member.patch] = place;
        out_sizes[place] = weight(member.patch);
      }
      const T* token = x.at(member);
#pragma unroll 4
      for (int32_t c = lane_id() * V; c < p.channels; c += kWarp * V)
        store_pack<T, V>(tokens + int64_t(place) * p.channels + c, load_pack<T, V>(token + c));
    }
    return;
  }
  float total = 0.0f;
  for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
    total += weight(member.patch);
    if (lane_id() == 0) assignment[member.patch] = merged_row;
  }
  if (lane_id() == 0) out_sizes[merged_row] = total;
  for (int32_t c = lane_id() * V; c < p.channels; c += kWarp * V) {
    float sum[V] = {};
#pragma unroll 4
    for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
      const Pack<T, V> piece = load_pack<T, V>(x.at(member) + c);
      const float s = weight(member.patch) * kShare;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += s * to_float(piece.at[i]);
    }
    Pack<T, V> mean;
#pragma unroll
    for (int i = 0; i < V; ++i) mean.at[i] = from_float<T>(sum[i] / (total * kShare));
    store_pack<T, V>(tokens + int64_t(merged_row) * p.channels + c, mean);
  }
}

// Writes prefix token `item`, or row `item - prefix` if it is padding. Called by one warp.
template <class T, int V>
__device__ __forceinline__ void write_other(const MergeParameters& p, int64_t b, int32_t item, int32_t rows) {
  const bool is_prefix = item < p.prefix;
  const int32_t place = is_prefix ? item : item - p.prefix;
  if (!is_prefix && place < rows) return;
  const T* from = static_cast<const T*>(p.x) + b * p.batch_stride + place * p.row_stride;
  T* to = static_cast<T*>(p.tokens) + (b * p.capacity + place) * p.channels;
  for (int32_t c = lane_id() * V; c < p.channels; c += kWarp * V)
    store_pack<T, V>(to + c, is_prefix ? load_pack<T, V>(from + c) : Pack<T, V>{});
  if (lane_id() != 0) return;
  p.out_sizes[b * p.capacity + place] = !is_prefix ? 0.0f : p.sizes ? p.sizes[b * p.size_stride + place] : 1.0f;
  if (is_prefix) p.assignment[b * (p.prefix + p.patches) + place] = place;
}

template <class T>
__device__ __forceinline__ MergeTokens<T> tokens_in_global(const MergeParameters& p, int64_t b) {
  return {static_cast<const T*>(p.x) + b * p.batch_stride + p.prefix * p.row_stride, p.row_stride, false};
}

}  // namespace mustdrop
