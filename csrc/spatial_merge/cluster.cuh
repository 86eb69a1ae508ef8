// SPDX-License-Identifier: Apache-2.0
// spatial_merge in one launch: a cluster of blocks holds an image in shared memory.
#pragma once

#include "spatial_merge/kernel.cuh"

namespace mustdrop {

// Offsets in a block's shared memory, in bytes; the launcher allocates `total`.
struct MergeLayout {
  int64_t similarity, rank, window_row, row, inverse, scratch, tokens, total;
};

// `part`: windows per block. `row_bytes`: bytes of a token.
__host__ __device__ inline MergeLayout merge_layout(const MergeParameters& p, int32_t part, int64_t row_bytes) {
  MergeLayout at{};
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  at.similarity = place(p.window_count * int64_t(4));
  at.rank = place(p.window_count * int64_t(4));
  at.window_row = place(p.window_count * int64_t(4));
  at.row = place(p.patches * int64_t(4));
  at.inverse = place(int64_t(part) * p.members * 4);
  at.scratch = place(kWarp * 4);
  at.tokens = place(int64_t(part) * p.members * row_bytes);
  at.total = end;
  return at;
}

// Starts the copies of a window's tokens to shared memory. Called by one warp.
template <class T, int V>
__device__ __forceinline__ void fetch_window(const MergeParameters& p, const MergeWindow& w, const MergeTokens<T>& from,
                                             T* to) {
  for (auto member = MergeMember::first(p, w); member.m < w.count; member.next(p, w)) {
    const T* token = from.at(member);
    for (int32_t c = lane_id() * V; c < p.channels; c += kWarp * V)
      copy16_async(to + int64_t(member.m) * p.channels + c, token + c, true);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMergeThreads) merge_cluster_kernel(const __grid_constant__ MergeParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  const int32_t blocks = static_cast<int32_t>(cluster_size()), rank = static_cast<int32_t>(cluster_rank());
  const int32_t part = (p.window_count + blocks - 1) / blocks;
  const MergeLayout at = merge_layout(p, part, p.channels * int64_t(sizeof(T)));
  float* similarity = reinterpret_cast<float*>(memory + at.similarity);      // [W], of the whole image
  int32_t* order = reinterpret_cast<int32_t*>(memory + at.rank);             // [W]
  int32_t* window_row = reinterpret_cast<int32_t*>(memory + at.window_row);  // [W]
  int32_t* row = reinterpret_cast<int32_t*>(memory + at.row);                // [N]
  float* inverse = reinterpret_cast<float*>(memory + at.inverse);            // [part, members]
  int32_t* scratch = reinterpret_cast<int32_t*>(memory + at.scratch);        // [warps]
  T* held = reinterpret_cast<T*>(memory + at.tokens);                        // [part, members, C]
  const int64_t b = blockIdx.x / blocks, window_elements = int64_t(p.members) * p.channels;
  const int32_t first = rank * part, own = clamp_to(p.window_count - first, 0, part);

  const MergeTokens<T> global = tokens_in_global<T>(p, b);
  for (int32_t i = warp_id(); i < own; i += kMergeWarps)
    fetch_window<T, V>(p, window_at(p, first + i), global, held + i * window_elements);
  copies_commit();
  copies_wait<0>();
  cluster_barrier();  // all blocks of the cluster are running, so their shared memory may be written
  for (int32_t i = warp_id(); i < own; i += kMergeWarps) {
    const MergeTokens<T> tokens{held + i * window_elements, p.channels, true};
    const float value = window_similarity<T, V>(p, window_at(p, first + i), tokens, inverse + i * p.members);
    if (static_cast<int32_t>(lane_id()) < blocks) cluster_shared(similarity, lane_id())[first + i] = value;
  }
  cluster_barrier();

  if (p.rule != MergeRule::threshold || p.merged_first)
    for (int32_t w = threadIdx.x; w < p.window_count; w += kMergeThreads)
      order[w] = count_before(p, similarity, w, 0, 1);
  const int32_t rows = assign_rows(p, similarity, order, p.budget, window_row, row, scratch);
  if (rank == 0 && threadIdx.x == 0) p.counts[b] = rows;

  for (int32_t i = warp_id(); i < own; i += kMergeWarps) {
    const MergeTokens<T> tokens{held + i * window_elements, p.channels, true};
    write_window<T, V>(p, b, window_at(p, first + i), tokens, window_row[first + i], row);
  }
  for (int32_t i = rank * kMergeWarps + static_cast<int32_t>(warp_id()); i < p.prefix + p.capacity;
       i += blocks * kMergeWarps)
    write_other<T, V>(p, b, i, rows);
}

}  // namespace mustdrop
