// SPDX-License-Identifier: Apache-2.0
// Parameters of the CPU kernel that decides which tokens stay.
#pragma once

#include "common/cpu.h"

namespace mustdrop::cpu {

enum class Rule : int32_t { topk, dual };

// Strides in elements, between sequences; the elements of a sequence are contiguous.
struct SelectParameters {
  Rule rule;
  Element element;                  // of scores and peak
  const void* scores;               // [B, L]; total in the dual rule
  const void* peak;                 // [B, L], dual
  const uint8_t* token_types;       // [B, L]
  const uint8_t* protected_tokens;  // [B, L] or null
  int64_t score_stride, peak_stride, type_stride, protected_stride;
  int64_t length;          // L
  int64_t drop_multiple;   // at least 1
  int64_t k;               // top-k
  const int32_t* budgets;  // [B] or null, top-k
  int64_t budget_stride;
  float global_threshold, individual_threshold;  // dual
  int64_t* keep;                                 // [B, capacity]
  int64_t capacity;
  int32_t* counts;           // [B]
  uint32_t* candidate_keys;  // workspace of the calling thread, L rounded up to a multiple of 64
};

}  // namespace mustdrop::cpu

// Sequences [begin, end).
MUSTDROP_CPU_KERNEL(select_tokens, SelectParameters)
