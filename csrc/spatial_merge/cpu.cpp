// SPDX-License-Identifier: Apache-2.0
// spatial_merge on the CPU: checks, windows to merge, row of each token.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/cpu_element.h"
#include "common/workers.h"
#include "spatial_merge/checks.h"
#include "spatial_merge/cpu_kernel.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 256 << 10;   // least work of a thread
constexpr int64_t kCachedBytes = 8ll << 20;  // of results that may stay in a cache for their next reader

struct Options {
  float threshold;
  OptionalInt budget;
  bool uniform, merged_first;
};

// Grid and window as [T, H, W].
cpu::MergeParameters describe(const Tensor& x, const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                              int64_t num_prefix_tokens, const OptionalTensor& sizes) {
  cpu::MergeParameters p{};
  p.prefix = num_prefix_tokens, p.length = x.size(1), p.channels = x.size(2);
  p.windows = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int given = axis - (3 - static_cast<int>(grid.size()));
    p.grid[axis] = given < 0 ? 1 : grid[given];
    p.window[axis] = given < 0 ? 1 : window[given];
    // ceil(grid / window) without overflow for huge windows.
    p.windows_per[axis] = p.grid[axis] / p.window[axis] + (p.grid[axis] % p.window[axis] != 0);
    p.windows *= p.windows_per[axis];
  }
  p.x = x.const_data_ptr(), p.x_batch = x.stride(0), p.x_row = x.stride(1);
  p.element = element_of(x);
  if (sizes) p.sizes = data<float>(*sizes), p.sizes_batch = sizes->stride(0);
  return p;
}

// Higher similarity first, ties to the lower index, NaN last.
struct BySimilarity {
  const float* similarity;
  bool operator()(int64_t i, int64_t j) const {
    const float a = similarity[i], b = similarity[j];
    if ((a != a) != (b != b)) return b != b;
    return a > b || (!(a < b) && i < j);
  }
};

// The rows of an image that are assigned so far.
struct AssignedRows {
  std::vector<int64_t> row;  // [windows] row of the merged token, -1: none yet
  int64_t next;
};

// Decides which windows merge and assigns rows, image by image. A slab is one window thick along the first axis with
// more than one position; its tokens are consecutive.
class Placement {
 public:
  Placement(const cpu::MergeParameters& p, const Options& options, uint8_t* merged, int64_t* assignment,
            int32_t* counts)
      : p_(p), options_(options), merged_(merged), assignment_(assignment), counts_(counts), complete_(p.windows) {
    const int64_t tokens = saturating_product({p.window[0], p.window[1], p.window[2]});
    for (int64_t w = 0; w < p.windows; ++w) complete_[w] = tokens > 1 && extent_tokens(w) == tokens;
  }

  int64_t slabs() const { return p_.windows_per[slab_axis()]; }

  // Merges windows that reach the threshold; with `uniform` only complete ones. Returns their number.
  int64_t merge_similar(int64_t b) { return merge_similar(b, 0, p_.windows); }

  int64_t merge_similar(int64_t b, int64_t first, int64_t last) {
    uint8_t* merged = merged_ + b * p_.windows;
    int64_t count = 0;
    for (int64_t w = first; w < last; ++w) {
      merged[w] = similarity(b)[w] >= options_.threshold && (complete_[w] || !options_.uniform);
      count += merged[w];
    }
    return count;
  }

  // Merges the most similar complete windows.
  void merge_top(int64_t b, int64_t number) {
    uint8_t* merged = merged_ + b * p_.windows;
    std::vector<int64_t> order;
    for (int64_t w = 0; w < p_.windows; ++w)
      if (complete_[w]) order.push_back(w);
    std::nth_element(order.begin(), order.begin() + number, order.end(), BySimilarity{similarity(b)});
    std::fill_n(merged, p_.windows, uint8_t{0});
    for (int64_t i = 0; i < number; ++i) merged[order[i]] = 1;
  }

  // Assigns the rows and the count of image b, whose merged windows are decided.
  void place(int64_t b) {
    AssignedRows rows = begin(b);
    if (options_.merged_first)
      for (const int64_t w : by_similarity(b)) rows.row[w] = rows.next++;
    for (int64_t slab = 0; slab < slabs(); ++slab) place_slab(b, slab, rows);
    end(b, rows);
  }

  // place() in parts: the slabs in order, after the decision on each slab's windows.
  AssignedRows begin(int64_t b) {
    std::iota(assignment_ + b * p_.length, assignment_ + b * p_.length + p_.prefix, 0);
    return {std::vector<int64_t>(p_.windows, -1), p_.prefix};
  }

  void place_slab(int64_t b, int64_t slab, AssignedRows& rows) {
    const uint8_t* merged = merged_ + b * p_.windows;
    int64_t from[2] = {0, 0}, to[2] = {p_.grid[0], p_.grid[1]};
    const int axis = slab_axis();
    from[axis] = slab * p_.window[axis], to[axis] = from[axis] + std::min(p_.window[axis], to[axis] - from[axis]);
    int64_t* assignment = assignment_ + b * p_.length + p_.prefix + (from[0] * p_.grid[1] + from[1]) * p_.grid[2];
    for (int64_t t = from[0]; t < to[0]; ++t)
      for (int64_t h = from[1]; h < to[1]; ++h)
        for (int64_t w = 0; w < p_.grid[2]; ++w, ++assignment) {
          const int64_t window = window_of(t, h, w);
          int64_t& row = rows.row[window];
          *assignment = merged[window] && row >= 0 ? row : rows.next++;
          if (merged[window]) row = *assignment;
        }
  }

  void end(int64_t b, const AssignedRows& rows) { counts_[b] = static_cast<int32_t>(rows.next); }

 private:
  int slab_axis() const { return p_.grid[0] == 1 ? 1 : 0; }

  const float* similarity(int64_t b) const { return p_.similarity + b * p_.windows; }

  std::vector<int64_t> by_similarity(int64_t b) const {
    std::vector<int64_t> order;
    for (int64_t w = 0; w < p_.windows; ++w)
      if (merged_[b * p_.windows + w]) order.push_back(w);
    std::sort(order.begin(), order.end(), BySimilarity{similarity(b)});
    return order;
  }

  int64_t window_of(int64_t t, int64_t h, int64_t w) const {
    return (t / p_.window[0] * p_.windows_per[1] + h / p_.window[1]) * p_.windows_per[2] + w / p_.window[2];
  }

  int64_t extent_tokens(int64_t window) const {
    int64_t tokens = 1;
    for (int axis = 2; axis >= 0; --axis) {
      const int64_t begin = window % p_.windows_per[axis] * p_.window[axis];
      tokens *= std::min(p_.window[axis], p_.grid[axis] - begin);
      window /= p_.windows_per[axis];
    }
    return tokens;
  }

  const cpu::MergeParameters& p_;
  const Options& options_;
  uint8_t* merged_;                // [B, windows]
  int64_t* assignment_;            // [B, length]
  int32_t* counts_;                // [B]
  std::vector<uint8_t> complete_;  // [windows] more than one token, not cut by the border
};

void copy_prefix(const cpu::MergeParameters& p, int64_t b, int64_t element_size) {
  const int64_t row = p.channels * element_size;
  for (int64_t token = 0; token < p.prefix; ++token) {
    if (row > 0)  // else x has no address
      std::memcpy(static_cast<char*>(p.tokens) + (b * p.capacity + token) * row,
                  static_cast<const char*>(p.x) + (b * p.x_batch + token * p.x_row) * element_size, row);
    p.out_sizes[b * p.capacity + token] = p.sizes ? p.sizes[b * p.sizes_batch + token] : 1.0f;
  }
}

// Merges one image slab by slab; a slab stays in the caches until it is written.
void merge_by_slabs(const cpu::MergeParameters& p, Placement& placement, const cpu::MergeTask& task, int64_t b) {
  AssignedRows rows = placement.begin(b);
  const int64_t slabs = placement.slabs();
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t windows = p.windows / slabs, first = slab * windows, item = b * p.windows + first;
    cpu::window_similarity(task, item, item + windows);
    placement.merge_similar(b, first, first + windows);
    placement.place_slab(b, slab, rows);
    cpu::write_windows(task, item, item + windows);
  }
  placement.end(b, rows);
}

void merge(const cpu::MergeParameters& p, Placement& placement, const Options& options, int64_t batch,
           int64_t element_size) {
  const int64_t window_bytes = p.length * p.channels * element_size / std::max<int64_t>(1, p.windows);
  const int64_t workers = worker_count(batch * p.windows, window_bytes, kGrainBytes);
  std::vector<float> sums(workers * p.channels);
  const auto task = [&](int64_t worker) { return cpu::MergeTask{&p, sums.data() + worker * p.channels}; };
  const auto place = [&](int64_t b) {
    placement.place(b);
    copy_prefix(p, b, element_size);
  };

  if (batch >= workers && !options.uniform) {                        // image by image: the second read hits the cache
    const bool by_slabs = !options.budget && !options.merged_first;  // decisions and rows do not depend on later slabs
    share_items(batch, workers, [&](int64_t worker, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * p.windows, last = first + p.windows;
        if (by_slabs) {
          merge_by_slabs(p, placement, task(worker), b);
          copy_prefix(p, b, element_size);
        } else {
          cpu::window_similarity(task(worker), first, last);
          options.budget ? placement.merge_top(b, *options.budget) : static_cast<void>(placement.merge_similar(b));
          place(b);
          cpu::write_windows(task(worker), first, last);
        }
        cpu::write_padding(task(worker), first, last);
      }
    });
    return;
  }
  share_items(batch * p.windows, workers,
              [&](int64_t worker, int64_t begin, int64_t end) { cpu::window_similarity(task(worker), begin, end); });
  int64_t number = options.budget.value_or(p.windows);
  if (!options.budget)
    for (int64_t b = 0; b < batch; ++b) number = std::min(number, placement.merge_similar(b));
  for (int64_t b = 0; b < batch; ++b) {
    if (options.budget || options.uniform) placement.merge_top(b, number);
    place(b);
  }
  share_items(batch * p.windows, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    cpu::write_windows(task(worker), begin, end);
    cpu::write_padding(task(worker), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_merge(const Tensor& x,  // [B, P+N, C]
                                                         std::vector<int64_t> grid, std::vector<int64_t> window,
                                                         double threshold, OptionalInt budget, bool uniform,
                                                         int64_t num_prefix_tokens,
                                                         const OptionalTensor& sizes,  // [B, P+N]
                                                         bool merged_first) {
  check_spatial_merge(x, grid, window, budget, uniform, num_prefix_tokens, sizes);
  cpu::level();  // throws here, not in a thread, if MUSTDROP_CPU_CAPABILITY is wrong

  cpu::MergeParameters p = describe(x, grid, window, num_prefix_tokens, sizes);
  p.capacity = p.length - (budget ? *budget * (saturating_product(window) - 1) : 0);
  const int64_t batch = x.size(0);
  Tensor tokens = new_empty(x, {batch, p.capacity, p.channels}, x.scalar_type());
  Tensor counts = new_empty(x, {batch}, ScalarType::Int);
  Tensor assignment = new_empty(x, {batch, p.length}, ScalarType::Long);
  Tensor out_sizes = new_empty(x, {batch, p.capacity}, ScalarType::Float);

  std::vector<float> similarity(batch * p.windows);
  std::vector<uint8_t> merged(batch * p.windows);
  p.similarity = similarity.data(), p.merged = merged.data();
  int64_t* assignment_data = mutable_data<int64_t>(assignment);
  int32_t* counts_data = mutable_data<int32_t>(counts);
  p.assignment = assignment_data, p.counts = counts_data;
  p.tokens = tokens.mutable_data_ptr(), p.out_sizes = mutable_data<float>(out_sizes);

  p.streams = batch * p.capacity * p.channels * static_cast<int64_t>(x.element_size()) > kCachedBytes;

  const Options options{static_cast<float>(threshold), budget, uniform, merged_first};
  Placement placement(p, options, merged.data(), assignment_data, counts_data);
  merge(p, placement, options, batch, static_cast<int64_t>(x.element_size()));
  return {tokens, counts, assignment, out_sizes};
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) { m.impl("spatial_merge", TORCH_BOX(&mustdrop::spatial_merge)); }
