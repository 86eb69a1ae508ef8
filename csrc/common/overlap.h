// SPDX-License-Identifier: Apache-2.0
// Exact test of whether strided views share memory, on plain numbers. The Python twin is
// mustdrop_kernels/ops/overlap.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mustdrop {

// The bytes of a view: begin + sum of i_d * stride_d + any byte of a run, 0 <= i_d < size_d. Strides descend.
struct StridedView {
  static constexpr int kMostDims = 4;

  int64_t begin = 0, end = 0;  // range that holds all of its bytes
  int64_t run = 0;             // contiguous bytes
  int dims = 0;                // outside the run
  int64_t size[kMostDims] = {}, stride[kMostDims] = {};

  // Adds a dimension, in any order, before `close`.
  void add(int64_t extent, int64_t bytes) {
    if (extent == 1) return;
    int d = dims++;
    for (; d > 0 && stride[d - 1] < bytes; --d) size[d] = size[d - 1], stride[d] = stride[d - 1];
    size[d] = extent, stride[d] = bytes;
  }

  // Folds the innermost dimensions without gaps into the run and sets begin and end.
  void close(int64_t address, int64_t element_bytes) {
    begin = address, run = element_bytes;
    while (dims && stride[dims - 1] == run) run *= size[--dims];
    end = begin + run;
    for (int d = 0; d < dims; ++d) end += (size[d] - 1) * stride[d];
  }
};

// The differences between an address of one view and an address of another: sums of stride_k times an integer in
// [low_k, high_k]. Strides descend.
class AddressDifferences {
 public:
  AddressDifferences(const StridedView& a, const StridedView& b) {
    for (int i = 0, j = 0; i < a.dims || j < b.dims;) {
      if (j == b.dims || (i < a.dims && a.stride[i] > b.stride[j])) {
        add(a.stride[i], 0, a.size[i] - 1), ++i;
      } else if (i == a.dims || b.stride[j] > a.stride[i]) {
        add(b.stride[j], 1 - b.size[j], 0), ++j;
      } else {
        add(a.stride[i], 1 - b.size[j], a.size[i] - 1), ++i, ++j;
      }
    }
    add(1, 1 - b.run, a.run - 1);
    least_[count_] = most_[count_] = 0;
    for (int k = count_ - 1; k >= 0; --k) {
      least_[k] = least_[k + 1] + stride_[k] * low_[k];
      most_[k] = most_[k + 1] + stride_[k] * high_[k];
    }
  }

  // `trivial`: whether the sum in which every integer but the last is 0 counts.
  bool contain(int64_t target, bool trivial) { return search(0, target, trivial); }

 private:
  static constexpr int kMostTerms = 2 * StridedView::kMostDims + 1;
  static constexpr int kMostSteps = 1 << 16;

  void add(int64_t stride, int64_t low, int64_t high) {
    stride_[count_] = stride, low_[count_] = low, high_[count_] = high;
    ++count_;
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  // A pair of layouts that kMostSteps steps do not decide counts as shared.
  bool search(int k, int64_t target, bool counts) {
    if (++steps_ > kMostSteps) return true;
    if (k == count_ - 1) return counts && low_[k] <= target && target <= high_[k];
    const int64_t s = stride_[k];
    const int64_t first = std::max(low_[k], -floor_div(most_[k + 1] - target, s));
    const int64_t last = std::min(high_[k], floor_div(target - least_[k + 1], s));
    for (int64_t c = first; c <= last; ++c)
      if (search(k + 1, target - c * s, counts || c != 0)) return true;
    return false;
  }

  int count_ = 0, steps_ = 0;
  int64_t stride_[kMostTerms], low_[kMostTerms], high_[kMostTerms];
  int64_t least_[kMostTerms + 1], most_[kMostTerms + 1];  // of the terms from k on
};

inline bool share_memory(const StridedView& a, const StridedView& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  return AddressDifferences(a, b).contain(b.begin - a.begin, true);
}

// Whether two elements of a view overlap.
inline bool overlaps_itself(const StridedView& a) {
  int64_t inner = a.run;  // extent of the inner dimensions in bytes
  bool nested = true;
  for (int d = a.dims - 1; d >= 0; --d) {
    nested = nested && a.stride[d] >= inner;
    inner += (a.size[d] - 1) * a.stride[d];
  }
  return !nested && AddressDifferences(a, a).contain(0, false);
}

}  // namespace mustdrop
