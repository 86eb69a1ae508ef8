// SPDX-License-Identifier: Apache-2.0
// Parameters of the CPU kernels of cls_attention, set by cpu_cls.cpp.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace mustdrop::cpu {

struct ClsParameters {
  const void* q;                                    // [B, heads, dim]
  const void* k;                                    // [B, heads, span, dim]
  int64_t q_batch, q_head, k_batch, k_head, k_row;  // strides in elements
  int64_t heads, span, dim;
  int64_t prefix;         // leading columns of the result that stay zero
  const int32_t* counts;  // [B], null: span
  int64_t count_stride;
  float scale;
  Element element;
  int64_t first;         // sequence of the first item
  float* probabilities;  // [sequences of this round, heads, span]
  float* out;            // [B, span], initially zero
};

struct ClsTask {
  const ClsParameters* parameters;
  float* scratch;  // this thread's, [dim]
};

// Number of columns of sequence b.
inline int64_t cls_columns(const ClsParameters& p, int64_t b) {
  const int64_t count = p.counts ? p.counts[b * p.count_stride] : p.span;
  return count < 0 ? 0 : count > p.span ? p.span : count;
}

}  // namespace mustdrop::cpu

MUSTDROP_CPU_KERNEL(cls_softmax, ClsTask)  // items: (sequence of this round, head)
MUSTDROP_CPU_KERNEL(cls_average, ClsTask)  // items: sequences of this round
