// SPDX-License-Identifier: Apache-2.0
// From sequences in any layout to the jobs of cpu_kernel.h: which rows vote, which keys they see, and in what order the
// threads compute it. Nothing here depends on the number of threads, so neither do the results.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_scores/cpu_kernel.h"
#include "common/stable.h"

namespace mustdrop {

// What all sequences of a call share. Strides in elements.
struct ScoreInputs {
  const void* q;
  const void* k;
  const float* lse;  // null: made from the keys
  cpu::Element element;
  int64_t heads, kv_heads, dim;
  int64_t q_head, q_row;
  int64_t k_head, k_row, k_dim;
  int64_t lse_head, lse_row;
  float scale;
  // Paged keys: position p is in block table[p / slots], at p % slots with stride k_row. No pages: slots = 0.
  int64_t blocks = 0, slots = 0, k_block = 0;
};

struct ScoreSequence {
  int64_t rows, length;      // row i stands at position length - rows + i
  int64_t q_begin, k_begin;  // where its first row and key are
  int64_t lse_begin;
  const int32_t* table;  // [ceil(length / slots)], null without pages
  const uint8_t* types;  // [length]
  float* total;          // [length], null where the map is wanted
  float* peak;
  float* map;  // [max_rows, map_stride], null where the scores are wanted
  int64_t map_stride;
  int64_t max_rows;  // query rows past it are left out
  bool overwrites;   // an earlier sequence of the call has the same places in the results: the last one counts
};

// Adds to the results, which are zero at first. `like` says where workspaces are allocated.
void run_scores(const ScoreInputs& inputs, const std::vector<ScoreSequence>& sequences, const Tensor& like);

}  // namespace mustdrop
