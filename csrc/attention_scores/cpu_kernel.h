// SPDX-License-Identifier: Apache-2.0
// Parameters of the CPU kernels of the scores: plain data, set by cpu_plan.cpp.
//
// A job is a set of query rows of one sequence. Its keys are split into chunks of kChunk, the vision keys first. A lane
// is a pair (query head of a key head's group, row): lane = head * rows + row. Vectors run over lanes, so a softmax
// stays within its lane and only the last step, the sum over rows, adds lanes.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace mustdrop::cpu {

constexpr int64_t kChunk = 48;                    // keys of a work item, a multiple of each level's register block
constexpr int64_t kLaneStep = 16;                 // the widest vector; strides of lanes and rows are multiples of it
constexpr int64_t kTileKeys = 16, kTileDim = 32;  // of a bfloat16 tile in AMX registers: 16 rows of 64 bytes

struct ScoreParameters {
  // Shapes
  int64_t heads, kv_heads, group, dim;  // group = heads / kv_heads
  int64_t rows, row_stride;             // query rows, and rounded up to kLaneStep
  int64_t lanes, lane_stride;           // group * rows, and rounded up
  int64_t vision, text;                 // keys
  int64_t vision_chunks, text_chunks;
  float scale;
  Element element;  // of q and k
  bool paired;      // products of bfloat16 pairs (from level avx512_bf16 on); query then holds unscaled pairs
  bool tiled;       // and of whole tiles (level amx_bf16)

  // Inputs; offsets and strides in elements
  const void* q;
  const void* k;
  int64_t q_head, k_head, k_dim;  // strides of heads, and of k's last dimension
  const int64_t* row_offset;      // [rows] offset of a row in q
  const int32_t* row_position;    // [row_stride], -1 past the rows
  const int32_t* lane_position;   // [lane_stride], -1 past the lanes
  int32_t first_position;         // lowest position of the rows
  const int64_t* vision_offset;   // [vision] offset of a key in k
  const int64_t* text_offset;     // [text]
  const int32_t* vision_position;
  const int32_t* text_position;
  const float* lse;           // null: computed from the keys
  int64_t lse_head;           // its head stride
  const int64_t* lse_offset;  // [rows]

  // Workspace
  int64_t first_head, block_heads;  // the key heads of this round
  float* query;                     // [kv_heads, dim * lane_stride] scaled rows in tiles of vectors, see pack_rows
  float* lane_lse;                  // [kv_heads, lane_stride]
  // [block_heads, vision_chunks + text_chunks, 2, lane_stride] maximum (later: factor), sum of exponentials
  float* stats;
  float* weights;  // [block_heads, vision_chunks, kChunk, lane_stride] exponentials over their chunk's maximum
  float* mean;     // [vision_chunks, kChunk, row_stride] sum over heads so far

  // Results
  float* total;  // [positions], null for text_vision_attention
  float* peak;   // [positions]
  float* map;    // [rows, map_stride], null for the scores
  int64_t map_stride;
};

struct ScoreTask {
  const ScoreParameters* parameters;
  float* scratch;  // [scratch_floats(parameters)], this thread's
};

// One chunk's keys in float32, its scores with one tile of lanes, and its weights if lse is given.
constexpr int64_t kMaxTile = 48;
inline int64_t scratch_floats(const ScoreParameters& p) {
  return kChunk * (p.dim + kMaxTile + (p.lse ? p.lane_stride : 0)) + kLaneStep;
}

}  // namespace mustdrop::cpu

MUSTDROP_CPU_KERNEL(pack_query, ScoreTask)        // items: key heads
MUSTDROP_CPU_KERNEL(score_chunks, ScoreTask)      // items: (key head of the round, chunk): weights and their stats
MUSTDROP_CPU_KERNEL(normalize, ScoreTask)         // items: (key head of the round, kLaneStep lanes): stats to factors
MUSTDROP_CPU_KERNEL(average_heads, ScoreTask)     // items: vision chunks: mean, and at the last head the results
MUSTDROP_CPU_KERNEL(score_normalized, ScoreTask)  // items: vision chunks: all of it if lse is given
