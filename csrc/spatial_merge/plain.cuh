// SPDX-License-Identifier: Apache-2.0
// spatial_merge in two launches: similarities, then all else; or, for many windows, in up to four: similarities, ranks
// if an order is needed, rows, tokens.
#pragma once

#include "spatial_merge/kernel.cuh"

namespace mustdrop {

// A warp per window of an image.
template <class T, int V>
__global__ void __launch_bounds__(kMergeThreads) merge_similarity_kernel(const __grid_constant__ MergeParameters p) {
  const int64_t item = blockIdx.x * int64_t(kMergeWarps) + warp_id();
  if (item >= int64_t(p.batch) * p.window_count) return;
  const int64_t b = item / p.window_count;
  const MergeWindow w = window_at(p, static_cast<int32_t>(item % p.window_count));
  const float value = window_similarity<T, V>(p, w, tokens_in_global<T>(p, b), p.inverse + item * p.members);
  if (lane_id() == 0) p.similarity[item] = value;
}

// A warp per window of an image.
static __global__ void __launch_bounds__(kMergeThreads) merge_rank_kernel(const __grid_constant__ MergeParameters p) {
  const int64_t item = blockIdx.x * int64_t(kMergeWarps) + warp_id();
  if (item >= int64_t(p.batch) * p.window_count) return;
  const float* similarity = p.similarity + item / p.window_count * p.window_count;
  const int32_t index = static_cast<int32_t>(item % p.window_count);
  const int32_t before = warp_sum(count_before(p, similarity, index, static_cast<int32_t>(lane_id()), kWarp));
  if (lane_id() == 0) p.rank[item] = before;
}

// With `uniform`: the smallest number over the images of complete windows that reach the threshold. Called by one
// block.
__device__ __forceinline__ int32_t fewest_similar(const MergeParameters& p, int32_t* fewest) {  // fewest [kMergeWarps]
  int32_t least = p.window_count;
  for (int64_t b = warp_id(); b < p.batch; b += kMergeWarps) {
    const float* similarity = p.similarity + b * p.window_count;
    int32_t similar = 0;
    for (int32_t w = lane_id(); w < p.window_count; w += kWarp)
      similar += is_candidate(p, similarity, w) && similarity[w] >= p.threshold;
    similar = warp_sum(similar);
    least = similar < least ? similar : least;
  }
  if (lane_id() == 0) fewest[warp_id()] = least;
  __syncthreads();
  for (int i = 0; i < kMergeWarps; ++i) least = fewest[i] < least ? fewest[i] : least;
  return least;
}

// Shared memory of merge_finish_kernel in bytes.
__host__ __device__ inline int64_t merge_finish_bytes(const MergeParameters& p) {
  return (int64_t(3) * p.window_count + p.patches + 2 * kWarp) * 4;
}

// p.parts blocks per image. Each decides redundantly for the whole image, which is faster than communication, and
// writes every p.parts-th window, prefix token and padding row.
template <class T, int V>
__global__ void __launch_bounds__(kMergeThreads, 3) merge_finish_kernel(const __grid_constant__ MergeParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  float* similarity = reinterpret_cast<float*>(memory);                  // [W]
  int32_t* order = reinterpret_cast<int32_t*>(memory) + p.window_count;  // [W]
  int32_t* window_row = order + p.window_count;                          // [W]
  int32_t* row = window_row + p.window_count;                            // [N]
  int32_t* scratch = row + p.patches;                                    // [2 kWarp]
  const int64_t b = blockIdx.x / p.parts;
  const int32_t part = static_cast<int32_t>(blockIdx.x) % p.parts, warp = static_cast<int32_t>(warp_id());
  for (int32_t w = threadIdx.x; w < p.window_count; w += kMergeThreads)
    similarity[w] = p.similarity[b * p.window_count + w];
  const int32_t most = p.rule == MergeRule::uniform ? fewest_similar(p, scratch + kWarp) : p.budget;
  __syncthreads();  // the similarities are in shared memory
  if (p.rule != MergeRule::threshold || p.merged_first)
    for (int32_t w = threadIdx.x; w < p.window_count; w += kMergeThreads)
      order[w] = count_before(p, similarity, w, 0, 1);
  const int32_t rows = assign_rows(p, similarity, order, most, window_row, row, scratch);
  if (part == 0 && threadIdx.x == 0) p.counts[b] = rows;

  const MergeTokens<T> tokens = tokens_in_global<T>(p, b);
  for (int32_t i = warp * p.parts + part; i < p.window_count; i += kMergeWarps * p.parts)
    write_window<T, V>(p, b, window_at(p, i), tokens, window_row[i], row);
  for (int32_t i = warp * p.parts + part; i < p.prefix + p.capacity; i += kMergeWarps * p.parts)
    write_other<T, V>(p, b, i, rows);
}

// A block per image.
static __global__ void __launch_bounds__(kMergeThreads) merge_assign_kernel(const __grid_constant__ MergeParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  int32_t* scratch = reinterpret_cast<int32_t*>(memory);  // [2 kMergeWarps]
  const int64_t b = blockIdx.x, first = b * p.window_count;
  const int32_t most = p.rule == MergeRule::uniform ? fewest_similar(p, scratch + kMergeWarps) : p.budget;
  const int32_t rows =
      assign_rows(p, p.similarity + first, p.rank + first, most, p.window_row + first, p.row + b * p.patches, scratch);
  if (threadIdx.x == 0) p.counts[b] = rows;
}

// A warp per window, prefix token or padding row of an image.
template <class T, int V>
__global__ void __launch_bounds__(kMergeThreads) merge_write_kernel(const __grid_constant__ MergeParameters p) {
  const int64_t items = int64_t(p.window_count) + p.prefix + p.capacity;
  const int64_t item = blockIdx.x * int64_t(kMergeWarps) + warp_id();
  if (item >= items * p.batch) return;
  const int64_t b = item / items;
  const int32_t index = static_cast<int32_t>(item % items);
  if (index < p.window_count) {
    write_window<T, V>(p, b, window_at(p, index), tokens_in_global<T>(p, b), p.window_row[b * p.window_count + index],
                       p.row + b * p.patches);
  } else {
    write_other<T, V>(p, b, index - p.window_count, p.counts[b]);
  }
}

}  // namespace mustdrop
