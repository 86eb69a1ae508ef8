// SPDX-License-Identifier: Apache-2.0
// spatial_merge on the CPU: how alike a window's tokens are, and writing what becomes of them.
//
//   u_i = x_i / max(|x_i|, 1e-8)
//   similarity = (|sum u_i|^2 - sum |u_i|^2) / (n (n - 1)), the mean of cos(x_i, x_j) over ordered pairs i != j
//   merged token = sum s_i x_i / sum s_i
#include "spatial_merge/cpu_kernel.h"

#include <cmath>
#include <cstring>

#include "common/cpu_math.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

WindowExtent extent_of(const MergeJob& job, int64_t window) {
  WindowExtent extent;
  for (int axis = 2; axis >= 0; --axis) {
    const int64_t begin = window % job.windows_per[axis] * job.window[axis], end = begin + job.window[axis];
    extent.begin[axis] = begin;
    extent.end[axis] = end < job.grid[axis] ? end : job.grid[axis];
    window /= job.windows_per[axis];
  }
  return extent;
}

// Calls visit(token) for each token of the window, in raster order; tokens are numbered with the prefix.
template <class Visit>
void for_each_token(const MergeJob& job, const WindowExtent& extent, const Visit& visit) {
  for (int64_t t = extent.begin[0]; t < extent.end[0]; ++t)
    for (int64_t h = extent.begin[1]; h < extent.end[1]; ++h)
      for (int64_t w = extent.begin[2]; w < extent.end[2]; ++w)
        visit(job.prefix + (t * job.grid[1] + h) * job.grid[2] + w);
}

template <class T>
float square_sum(const T* row, int64_t channels) {
  VecFloat even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    const VecFloat a = load(row + c), b = load(row + c + kLanes);
    even += a * a, odd += b * b;
  }
  for (; c < channels; c += kLanes) {
    const VecFloat a = c + kLanes <= channels ? load(row + c) : load_part(row + c, channels - c);
    even += a * a;
  }
  return sum_of(even + odd);
}

// sum += factor * row
template <class T>
void add_scaled(float* sum, float factor, const T* row, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(sum + c, load(sum + c) + factor * load(row + c));
  for (; c < channels; ++c) sum[c] += factor * to_float(row[c]);
}

template <class T>
void similarity_of(const MergeTask& task, int64_t item) {
  const MergeJob& job = *task.job;
  const WindowExtent extent = extent_of(job, item % job.windows);
  const int64_t n = extent.tokens();
  const T* image = static_cast<const T*>(job.x) + item / job.windows * job.x_batch;
  float squares = 0;
  memset(task.sum, 0, job.channels * sizeof(float));
  for_each_token(job, extent, [&](int64_t token) {
    const T* row = image + token * job.x_row;
    const float square = square_sum(row, job.channels), norm = sqrtf(square);
    const float scale = 1.0f / (norm < 1e-8f ? 1e-8f : norm);
    squares += square * scale * scale;
    add_scaled(task.sum, scale, row, job.channels);
  });
  const float pairs = static_cast<float>(n) * static_cast<float>(n - 1);
  job.similarity[item] = n > 1 ? (square_sum(task.sum, job.channels) - squares) / pairs : NAN;
}

template <class T>
void write_merged(const MergeTask& task, const WindowExtent& extent, int64_t b) {
  const MergeJob& job = *task.job;
  const T* image = static_cast<const T*>(job.x) + b * job.x_batch;
  float size = 0;
  int64_t row = -1;
  memset(task.sum, 0, job.channels * sizeof(float));
  for_each_token(job, extent, [&](int64_t token) {
    const float weight = job.sizes ? job.sizes[b * job.sizes_batch + token] : 1.0f;
    size += weight;
    row = job.source[b * job.length + token];
    add_scaled(task.sum, weight, image + token * job.x_row, job.channels);
  });
  T* out = static_cast<T*>(job.tokens) + (b * job.capacity + row) * job.channels;
  for (int64_t c = 0; c < job.channels; ++c) from_float(task.sum[c] / size, out[c]);
  job.out_sizes[b * job.capacity + row] = size;
}

template <class T>
void write_window(const MergeTask& task, int64_t item) {
  const MergeJob& job = *task.job;
  const int64_t b = item / job.windows, window = item % job.windows;
  const WindowExtent extent = extent_of(job, window);
  T* out = static_cast<T*>(job.tokens) + b * job.capacity * job.channels;
  float* out_sizes = job.out_sizes + b * job.capacity;
  if (job.merged[item]) {
    write_merged<T>(task, extent, b);
  } else {
    const T* image = static_cast<const T*>(job.x) + b * job.x_batch;
    for_each_token(job, extent, [&](int64_t token) {
      const int64_t row = job.source[b * job.length + token];
      memcpy(out + row * job.channels, image + token * job.x_row, job.channels * sizeof(T));
      out_sizes[row] = job.sizes ? job.sizes[b * job.sizes_batch + token] : 1.0f;
    });
  }
  // The padding is dealt out evenly over the windows.
  const int64_t padding = job.capacity - job.counts[b];
  const int64_t first = job.counts[b] + padding * window / job.windows;
  const int64_t last = job.counts[b] + padding * (window + 1) / job.windows;
  memset(out + first * job.channels, 0, (last - first) * job.channels * sizeof(T));
  memset(out_sizes + first, 0, (last - first) * sizeof(float));
}

}  // namespace

void window_similarity(const MergeTask& task, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) switch (task.job->element) {
      case Element::f32:
        similarity_of<float>(task, item);
        break;
      case Element::f16:
        similarity_of<half>(task, item);
        break;
      case Element::bf16:
        similarity_of<bfloat16>(task, item);
        break;
    }
}

void write_windows(const MergeTask& task, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) switch (task.job->element) {
      case Element::f32:
        write_window<float>(task, item);
        break;
      case Element::f16:
        write_window<half>(task, item);
        break;
      case Element::bf16:
        write_window<bfloat16>(task, item);
        break;
    }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
