// SPDX-License-Identifier: Apache-2.0
// Which tokens stay, on the CPU: what cpu.cpp hands to the kernel of an instruction set.
#pragma once

#include "common/cpu.h"

namespace mustdrop::cpu {

enum class Rule : int32_t { topk, dual };

// Strides are in elements, between sequences; inside one the elements are contiguous.
struct SelectArgs {
  Rule rule;
  Element element;       // of score and peak
  const void* score;     // [B, L]: scores, or total
  const void* peak;      // [B, L], dual
  const uint8_t* types;  // [B, L]
  const uint8_t* keeps;  // [B, L], protected tokens; may be null
  int64_t score_stride, peak_stride, types_stride, keeps_stride;
  int64_t length;          // L
  int64_t drop_multiple;   // at least 1
  int64_t k;               // topk
  const int32_t* budgets;  // [B], topk; may be null
  int64_t budgets_stride;
  float global_threshold, individual_threshold;  // dual
  int64_t* keep;                                 // [B, capacity]
  int64_t capacity;
  int32_t* counts;   // [B]
  uint32_t* narrow;  // of the calling thread, L entries to a multiple of 64: keys that are still in question
};

}  // namespace mustdrop::cpu

// Sequences [begin, end).
MUSTDROP_CPU_KERNEL(select_tokens, SelectArgs)
