// SPDX-License-Identifier: Apache-2.0
// Plans the jobs of cpu_kernel.h for sequences in any layout: query rows, their keys, and the order of
// computation. Nothing depends on the number of threads, so neither do the results.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_scores/cpu_kernel.h"
#include "common/stable.h"

namespace mustdrop {

// Inputs that all sequences of a call share. Strides in elements.
struct ScoreInputs {
  const void* q;
  const void* k;
  const float* lse;  // null: computed from the keys
  cpu::Element element;
  int64_t heads, kv_heads, dim;
  int64_t q_head, q_row;
  int64_t k_head, k_row, k_dim;
  int64_t lse_head, lse_row;
  float scale;
  // Paged keys: position p is in block table[p / page_size], slot p % page_size with stride k_row.
  // Not paged: page_size = 0.
  int64_t blocks = 0, page_size = 0, k_block = 0;
};

struct ScoreSequence {
  int64_t rows, length;      // row i has position length - rows + i
  int64_t q_begin, k_begin;  // offsets of its first row and key
  int64_t lse_begin;
  const int32_t* table;  // [ceil(length / page_size)], null if not paged
  const uint8_t* types;  // [length]
  float* total;          // [length], null for text_vision_attention
  float* peak;
  float* map;  // [max_rows, map_stride], null for the scores
  int64_t map_stride;
  int64_t max_rows;  // query rows past it are ignored
  bool overwrites;   // an earlier sequence of the call has the same results, which this one replaces
};

// Adds to the results, which are initially zero. Allocates workspaces on the device of `like`.
void run_scores(const ScoreInputs& inputs, const std::vector<ScoreSequence>& sequences, const Tensor& like);

}  // namespace mustdrop
