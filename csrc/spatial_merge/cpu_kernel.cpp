// SPDX-License-Identifier: Apache-2.0
// spatial_merge on the CPU: similarity of a window's tokens, and its rows of the result.
//
//   u_i = x_i / max(|x_i|, 1e-8)
//   similarity = (|sum u_i|^2 - sum |u_i|^2) / (n (n - 1)), the mean of cos(x_i, x_j) over ordered pairs i != j
//   merged token = sum s_i x_i / sum s_i
#include "spatial_merge/cpu_kernel.h"

#include <cmath>
#include <cstring>

#include "common/cpu_math.h"
#include "spatial_merge/norms.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

WindowExtent extent_of(const MergeParameters& p, int64_t window) {
  WindowExtent extent;
  for (int axis = 2; axis >= 0; --axis) {
    const int64_t begin = window % p.windows_per[axis] * p.window[axis], end = begin + p.window[axis];
    extent.begin[axis] = begin;
    extent.end[axis] = end < p.grid[axis] ? end : p.grid[axis];
    window /= p.windows_per[axis];
  }
  return extent;
}

// Calls visit(token) for each token of the window, in raster order; tokens are numbered with the prefix.
template <class Visit>
void for_each_token(const MergeParameters& p, const WindowExtent& extent, const Visit& visit) {
  for (int64_t t = extent.begin[0]; t < extent.end[0]; ++t)
    for (int64_t h = extent.begin[1]; h < extent.end[1]; ++h)
      for (int64_t w = extent.begin[2]; w < extent.end[2]; ++w) visit(p.prefix + (t * p.grid[1] + h) * p.grid[2] + w);
}

// |scale row|^2.
template <class T>
float square_sum(const T* row, int64_t channels, float scale = 1.0f) {
  constexpr int kSums = 4;  // independent additions
  VecFloat sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= channels; c += kSums * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const VecFloat a = load(row + c + i * kLanes) * scale;
      sums[i] += a * a;
    }
  for (; c < channels; c += kLanes) {
    const VecFloat a = (c + kLanes <= channels ? load(row + c) : load_part(row + c, channels - c)) * scale;
    sums[0] += a * a;
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A weighted sum of rows. Adds several rows at a time, to write the sum once for all of them.
template <class T>
class RowSum {
 public:
  RowSum(float* sum, int64_t channels) : sum_(sum), channels_(channels) {}  // [channels], overwritten

  void add(float weight, const T* row) {
    weight_[count_] = weight, row_[count_] = row;
    if (++count_ == kRows) flush();
  }

  const float* finish() {
    if (count_ || !begun_) flush();
    return sum_;
  }

 private:
  static constexpr int kRows = 4, kWidth = 4;

  void flush() {
    int64_t c = 0;
    for (; c + kWidth * kLanes <= channels_; c += kWidth * kLanes) add_columns<kWidth>(c);
    for (; c + kLanes <= channels_; c += kLanes) add_columns<1>(c);
    for (; c < channels_; ++c) {
      float sum = begun_ ? sum_[c] : 0.0f;
      for (int i = 0; i < count_; ++i) sum += weight_[i] * to_float(row_[i][c]);
      sum_[c] = sum;
    }
    begun_ = true, count_ = 0;
  }

  template <int W>
  void add_columns(int64_t c) {
    VecFloat sums[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[w] = begun_ ? load(sum_ + c + w * kLanes) : VecFloat{};
    for (int i = 0; i < count_; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[w] += weight_[i] * load(row_[i] + c + w * kLanes);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(sum_ + c + w * kLanes, sums[w]);
  }

  float* sum_;
  int64_t channels_;
  bool begun_ = false;  // sum_ holds earlier rows
  int count_ = 0;
  float weight_[kRows];
  const T* row_[kRows];
};

template <class T>
void similarity_of(const MergeTask& task, int64_t item) {
  const MergeParameters& p = *task.parameters;
  const WindowExtent extent = extent_of(p, item % p.windows);
  const int64_t n = extent.tokens();
  const T* image = static_cast<const T*>(p.x) + item / p.windows * p.x_batch;
  float squares = 0;
  RowSum<T> sum(task.sum, p.channels);
  for_each_token(p, extent, [&](int64_t token) {
    const T* row = image + token * p.x_row;
    float square = square_sum(row, p.channels);
    const float scale = norm_scale(square);
    if (scale != 1.0f) square = square_sum(row, p.channels, scale);
    const TokenUnit unit = token_unit(square, scale);
    squares += unit.square;
    sum.add(unit.weight, row);
  });
  const float pairs = static_cast<float>(n) * static_cast<float>(n - 1);
  p.similarity[item] = n > 1 ? (square_sum(sum.finish(), p.channels, 1.0f / kUnit) - squares) / pairs : NAN;
}

template <class T>
void write_merged(const MergeTask& task, const WindowExtent& extent, int64_t b) {
  const MergeParameters& p = *task.parameters;
  const T* image = static_cast<const T*>(p.x) + b * p.x_batch;
  float size = 0;
  int64_t row = -1;
  RowSum<T> sum(task.sum, p.channels);
  for_each_token(p, extent, [&](int64_t token) {
    const float weight = p.sizes ? p.sizes[b * p.sizes_batch + token] : 1.0f;
    size += weight;
    row = p.assignment[b * p.length + token];
    sum.add(weight * kShare, image + token * p.x_row);
  });
  const float* of_window = sum.finish();
  T* out = static_cast<T*>(p.tokens) + (b * p.capacity + row) * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) from_float(of_window[c] / (size * kShare), out[c]);
  p.out_sizes[b * p.capacity + row] = size;
}

void put_bytes(void* to, const void* from, int64_t bytes, bool streams) {
  if (streams)
    stream_bytes(to, from, bytes);
  else if (bytes > 0)  // else there is no address
    memcpy(to, from, bytes);
}

void put_zeros(void* to, int64_t bytes, bool streams) {
  if (streams)
    stream_zeros(to, bytes);
  else if (bytes > 0)
    memset(to, 0, bytes);
}

template <class T>
void write_window(const MergeTask& task, int64_t item) {
  const MergeParameters& p = *task.parameters;
  const int64_t b = item / p.windows;
  const WindowExtent extent = extent_of(p, item % p.windows);
  T* out = static_cast<T*>(p.tokens) + b * p.capacity * p.channels;
  float* out_sizes = p.out_sizes + b * p.capacity;
  if (p.merged[item]) {
    write_merged<T>(task, extent, b);
  } else {
    const T* image = static_cast<const T*>(p.x) + b * p.x_batch;
    for_each_token(p, extent, [&](int64_t token) {
      const int64_t row = p.assignment[b * p.length + token];
      put_bytes(out + row * p.channels, image + token * p.x_row, p.channels * sizeof(T), p.streams);
      out_sizes[row] = p.sizes ? p.sizes[b * p.sizes_batch + token] : 1.0f;
    });
  }
}

template <class T>
void pad_window(const MergeTask& task, int64_t item) {
  const MergeParameters& p = *task.parameters;
  const int64_t b = item / p.windows, window = item % p.windows, padding = p.capacity - p.counts[b];
  const int64_t first = p.counts[b] + padding * window / p.windows;
  const int64_t last = p.counts[b] + padding * (window + 1) / p.windows;
  T* out = static_cast<T*>(p.tokens) + (b * p.capacity + first) * p.channels;
  put_zeros(out, (last - first) * p.channels * sizeof(T), p.streams);
  memset(p.out_sizes + b * p.capacity + first, 0, (last - first) * sizeof(float));
}

}  // namespace

void window_similarity(const MergeTask& task, int64_t begin, int64_t end) {
  with_element(task.parameters->element, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) similarity_of<decltype(type)>(task, item);
  });
}

void write_windows(const MergeTask& task, int64_t begin, int64_t end) {
  with_element(task.parameters->element, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) write_window<decltype(type)>(task, item);
  });
  if (task.parameters->streams) end_streams();
}

void write_padding(const MergeTask& task, int64_t begin, int64_t end) {
  with_element(task.parameters->element, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) pad_window<decltype(type)>(task, item);
  });
  if (task.parameters->streams) end_streams();
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
