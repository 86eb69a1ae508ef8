// SPDX-License-Identifier: Apache-2.0
// Plans and launches the text-to-vision scoring kernels.
#pragma once

#include "attention_scores/matrix_kernel.cuh"
#include "attention_scores/plain_kernel.cuh"
#include "common/launch.h"

namespace mustdrop {

// Blocks of a cluster that share the heads: as many as it takes to give each multiprocessor a block.
inline unsigned score_cluster(const DeviceFacts& facts, int64_t tiles, int64_t heads) {
  unsigned cluster = 1;
  if (!has_clusters(facts)) return cluster;
  while (cluster < 8 && cluster * 2 <= heads && tiles * cluster < facts.multiprocessors) cluster *= 2;
  return cluster;
}

struct ScoreKernels {
  void (*scores)(ScoreParameters);
  void (*normaliser)(ScoreParameters);
  int64_t keys;         // of a block
  size_t shared_bytes;  // of either
};

template <class T, int kDim, int kRows>
ScoreKernels matrix_kernels() {
  return {score_matrix_kernel<T, kDim, kRows>, normaliser_matrix_kernel<T, kDim, kRows>, kMatrixKeys,
          MatrixShape<kDim, kRows>::kData + sizeof(MatrixShared<kRows>)};
}

template <class T, int V>
ScoreKernels plain_kernels() {
  return {score_plain_kernel<T, V>, normaliser_plain_kernel<T, V>, kPlainKeys, sizeof(PlainShared)};
}

// `aligned`: every key and row begins at a multiple of 16 bytes and has no gaps.
template <class T>
ScoreKernels kernels_for(int64_t dim, bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  if constexpr (sizeof(T) == 2) {
    if (aligned && dim <= 64) return matrix_kernels<T, 64, 128>();
    if (aligned && dim <= 128) return matrix_kernels<T, 128, 128>();
    if (aligned && dim <= 256) return matrix_kernels<T, 256, 64>();
  }
  return aligned ? plain_kernels<T, kVector>() : plain_kernels<T, 1>();
}

// Two launches, one where the caller has lse. `like`: for the workspace; `batch`: sequences.
inline void launch_scores(const Device& device, const Tensor& like, ScoreParameters p, int64_t batch, bool aligned) {
  const DeviceFacts facts = device.facts();
  with_float_type(like.scalar_type(), [&](auto* type) {
    const ScoreKernels kernels = kernels_for<std::remove_pointer_t<decltype(type)>>(p.dim, aligned);
    const int64_t tiles = ceil_div(std::max(p.keys, p.cu_k ? 0 : p.out_keys), kernels.keys);
    if (batch == 0 || tiles == 0) return;
    std::optional<Workspace> workspace;
    if (!p.lse) {
      const int64_t wanted = ceil_div(2 * facts.multiprocessors, batch * p.heads);
      p.splits = static_cast<int32_t>(clamp_to(wanted, 1, std::min<int64_t>(ceil_div(p.keys, kernels.keys), 16)));
      p.splits = std::max(p.splits, 1);
      const int64_t parts = int64_t(p.heads) * p.splits * p.partial_rows;
      workspace.emplace(like, Workspace::size(parts * static_cast<int64_t>(sizeof(MaximumAndSum))));
      p.partial = workspace->take<MaximumAndSum>(parts);
      const dim3 grid(static_cast<unsigned>(p.splits), static_cast<unsigned>(p.heads), blocks(batch));
      device.launch({grid, kScoreThreads, kernels.shared_bytes}, kernels.normaliser, p);
    }
    const unsigned cluster = score_cluster(facts, tiles * batch, p.heads);
    const dim3 grid(blocks(tiles * cluster), blocks(batch));
    device.launch({grid, kScoreThreads, kernels.shared_bytes, cluster}, kernels.scores, p);
  });
}

}  // namespace mustdrop
