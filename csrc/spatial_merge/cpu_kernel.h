// SPDX-License-Identifier: Apache-2.0
// Parameters of the CPU kernels of spatial_merge: plain data, set by cpu.cpp.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace mustdrop::cpu {

struct MergeParameters {
  // Shapes; an image is [T, H, W] patches, with T = 1 for still images
  int64_t prefix, length, capacity, channels;  // length = prefix + patches; capacity: rows of the result
  int64_t grid[3], window[3];
  int64_t windows_per[3], windows;  // per axis, including those that the border cuts; their product

  // Inputs; strides in elements
  const void* x;  // [B, length, channels]
  int64_t x_batch, x_row;
  Element element;
  const float* sizes;  // [B, length], null: ones
  int64_t sizes_batch;

  // Intermediate results
  float* similarity;          // [B, windows], NaN for windows of one token
  const uint8_t* merged;      // [B, windows]
  const int64_t* assignment;  // [B, length] row of each token
  const int32_t* counts;      // [B]

  // Results
  void* tokens;      // [B, capacity, channels]
  float* out_sizes;  // [B, capacity]
  bool streams;      // whether tokens exceed the caches: then stores are non-temporal
};

struct MergeTask {
  const MergeParameters* parameters;
  float* sum;  // [channels], this thread's
};

// The patches of one window: begin and end along each axis.
struct WindowExtent {
  int64_t begin[3], end[3];
  int64_t tokens() const { return (end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2]); }
};

}  // namespace mustdrop::cpu

MUSTDROP_CPU_KERNEL(window_similarity, MergeTask)  // items: (image, window)
MUSTDROP_CPU_KERNEL(write_windows, MergeTask)      // items: (image, window)
MUSTDROP_CPU_KERNEL(write_padding, MergeTask)      // items: (image, window), each with a share of the image's padding
