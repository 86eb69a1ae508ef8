// SPDX-License-Identifier: Apache-2.0
// spatial_merge on CUDA: checks, allocation, choice of the implementation.
#include "common/launch.h"
#include "spatial_merge/checks.h"
#include "spatial_merge/cluster.cuh"
#include "spatial_merge/plain.cuh"

namespace mustdrop {
namespace {

constexpr int kMergeCluster = 8;        // the portable cluster size
constexpr int kRankedInBlock = 512;     // windows that a block ranks by itself
constexpr int kAssignedInBlock = 4096;  // patches whose rows each block of an image assigns

int32_t narrow(int64_t value) {
  if (value > INT_MAX) refuse_argument("spatial_merge", "x", "must have sizes below 2^31, got ", value);
  return static_cast<int32_t>(value);
}

MergeParameters describe(const Tensor& x, const std::vector<int64_t>& grid, const std::vector<int64_t>& window) {
  MergeParameters p{};
  const size_t missing = 3 - grid.size();  // [H, W] is one frame
  p.window_count = p.window_size = p.members = 1;
  for (size_t d = 0; d < 3; ++d) {
    p.grid[d] = d < missing ? 1 : narrow(grid[d - missing]);
    const int64_t whole = d < missing ? 1 : std::min<int64_t>(window[d - missing], INT_MAX);
    p.window[d] = static_cast<int32_t>(std::min<int64_t>(whole, std::max(p.grid[d], 1)));
    p.windows[d] = narrow(ceil_div(p.grid[d], p.window[d]));
    p.window_count = narrow(int64_t(p.window_count) * p.windows[d]);
    p.window_size = static_cast<int32_t>(std::min<int64_t>(p.window_size * whole, INT_MAX));
    p.members *= p.window[d];
  }
  p.batch = narrow(x.size(0));
  p.channels = narrow(x.size(2));
  p.x = x.const_data_ptr();
  p.batch_stride = x.size(0) > 1 ? x.stride(0) : 0;
  p.row_stride = x.size(1) > 1 ? x.stride(1) : 0;
  return p;
}

bool is_ranked(const MergeParameters& p) { return p.rule != MergeRule::threshold || p.merged_first; }

template <class T, int V>
bool launch_cluster(const Device& device, const MergeParameters& p) {
  const DeviceFacts facts = device.facts();
  if (!has_clusters(facts) || p.rule == MergeRule::uniform) return false;
  if (is_ranked(p) && p.window_count > kRankedInBlock) return false;
  const int32_t part = narrow(ceil_div(p.window_count, kMergeCluster));
  const MergeLayout layout = merge_layout(p, part, p.channels * static_cast<int64_t>(sizeof(T)));
  if (layout.total > facts.shared_bytes) return false;
  device.launch(
      {dim3(blocks(int64_t(p.batch) * kMergeCluster)), kMergeThreads, static_cast<size_t>(layout.total), kMergeCluster},
      MUSTDROP_KERNEL(merge_cluster_kernel<T, V>), p);
  return true;
}

// Rows and tokens in one launch, for images with few windows.
template <class T, int V>
bool launch_finish(const Device& device, MergeParameters p) {
  const int64_t shared_bytes = merge_finish_bytes(p);
  if ((is_ranked(p) && p.window_count > kRankedInBlock) || p.patches > kAssignedInBlock) return false;
  // Enough blocks for the device; more would only repeat the assignment of rows.
  const int64_t useful = ceil_div(int64_t(p.window_count) + p.prefix + p.capacity, kMergeWarps);
  const int64_t wanted = ceil_div(4 * device.facts().multiprocessors, p.batch);
  p.parts = static_cast<int32_t>(std::max<int64_t>(1, std::min(useful, wanted)));
  device.launch({dim3(blocks(int64_t(p.batch) * p.parts)), kMergeThreads, static_cast<size_t>(shared_bytes)},
                MUSTDROP_KERNEL(merge_finish_kernel<T, V>), p);
  return true;
}

template <class T, int V>
void launch_plain(const Device& device, const Tensor& x, MergeParameters p) {
  const int64_t windows = int64_t(p.batch) * p.window_count, patches = int64_t(p.batch) * p.patches;
  Workspace workspace(
      x, 3 * Workspace::size(windows * 4) + Workspace::size(windows * p.members * 4) + Workspace::size(patches * 4));
  p.similarity = workspace.allocate<float>(windows);
  p.rank = workspace.allocate<int32_t>(windows);
  p.window_row = workspace.allocate<int32_t>(windows);
  p.inverse = workspace.allocate<float>(windows * p.members);
  p.row = workspace.allocate<int32_t>(patches);
  const Grid per_window{dim3(blocks(ceil_div(windows, kMergeWarps))), kMergeThreads};
  if (windows > 0) device.launch(per_window, MUSTDROP_KERNEL(merge_similarity_kernel<T, V>), p);
  if (launch_finish<T, V>(device, p)) return;
  if (windows > 0 && is_ranked(p)) device.launch(per_window, MUSTDROP_KERNEL(merge_rank_kernel), p);
  device.launch({dim3(blocks(p.batch)), kMergeThreads, 2 * kWarp * sizeof(int32_t)},
                MUSTDROP_KERNEL(merge_assign_kernel), p);
  const int64_t items = (int64_t(p.window_count) + p.prefix + p.capacity) * p.batch;
  if (items > 0)
    device.launch({dim3(blocks(ceil_div(items, kMergeWarps))), kMergeThreads},
                  MUSTDROP_KERNEL(merge_write_kernel<T, V>), p);
}

template <class T, int V>
void launch(const Device& device, const Tensor& x, const MergeParameters& p) {
  if constexpr (V > 1) {  // the copies to shared memory are 16 bytes each
    if (launch_cluster<T, V>(device, p)) return;
  }
  launch_plain<T, V>(device, x, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_merge(const Tensor& x,  // [B, P+N, C]
                                                         std::vector<int64_t> grid, std::vector<int64_t> window,
                                                         double threshold, OptionalInt budget, bool uniform,
                                                         int64_t num_prefix_tokens,
                                                         const OptionalTensor& sizes,  // [B, P+N]
                                                         bool merged_first) {
  check_spatial_merge(x, grid, window, budget, uniform, num_prefix_tokens, sizes);
  const Device device(x);
  MergeParameters p = describe(x, grid, window);
  const int64_t batch = x.size(0), length = x.size(1);
  p.prefix = narrow(num_prefix_tokens);
  p.patches = narrow(length - num_prefix_tokens);
  p.budget = narrow(budget.value_or(0));
  p.capacity = narrow(length - int64_t(p.budget) * (p.window_size - 1));
  p.threshold = static_cast<float>(threshold);
  p.rule = budget ? MergeRule::budget : uniform ? MergeRule::uniform : MergeRule::threshold;
  p.merged_first = merged_first;
  Tensor tokens = new_empty(x, {batch, p.capacity, x.size(2)}, x.scalar_type());
  Tensor counts = new_empty(x, {batch}, ScalarType::Int), assignment = new_empty(x, {batch, length}, ScalarType::Long);
  Tensor out_sizes = new_empty(x, {batch, p.capacity}, ScalarType::Float);
  if (batch == 0) return {tokens, counts, assignment, out_sizes};
  p.sizes = sizes ? data<float>(*sizes) : nullptr;
  p.size_stride = sizes ? sizes->stride(0) : 0;
  p.tokens = tokens.mutable_data_ptr();
  p.counts = mutable_data<int32_t>(counts);
  p.assignment = mutable_data<int64_t>(assignment);
  p.out_sizes = mutable_data<float>(out_sizes);
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVector = 16 / sizeof(T);
    aligned16(x, x.size(2)) ? launch<T, kVector>(device, x, p) : launch<T, 1>(device, x, p);
  });
  return {tokens, counts, assignment, out_sizes};
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("spatial_merge", TORCH_BOX(&mustdrop::spatial_merge));
}
