// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of the scores work on. Plain data: cpu_plan.cpp fills it in, cpu_kernel.cpp computes.
//
// A job is a set of query rows of one sequence. Its keys are dealt out in chunks of kChunk, the vision keys first. A lane is a
// pair (query head of a key head's group, row); lanes are what vectors run over: lane = head * rows + row, so that the
// softmax of a lane never leaves its lane and only the last step, the sum over rows, adds lanes up.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace mustdrop::cpu {

constexpr int64_t kChunk = 48;                    // keys of a work item; a multiple of every level's register block
constexpr int64_t kLaneStep = 16;                 // strides of lanes and rows are multiples of this, the widest vector
constexpr int64_t kTileKeys = 16, kTileDim = 32;  // of a tile of bfloat16 in AMX's registers: 16 rows of 64 bytes

struct ScoreParameters {
  // Shapes
  int64_t heads, kv_heads, group, dim;  // group = heads / kv_heads
  int64_t rows, row_stride;             // query rows, and rounded up to kLaneStep
  int64_t lanes, lane_stride;           // group * rows, and rounded up
  int64_t vision, text;                 // keys
  int64_t vision_chunks, text_chunks;
  float scale;
  Element element;  // of q and k
  bool paired;      // products take pairs of bfloat16 (from level avx512_bf16 on); query then holds pairs, not scaled
  bool tiled;       // and a tile of them at once (level amx_bf16)

  // Inputs; offsets and strides in elements
  const void* q;
  const void* k;
  int64_t q_head, k_head, k_dim;  // strides of heads, and of k's last dimension
  const int64_t* row_offset;      // [rows] where a row is in q
  const int32_t* row_position;    // [row_stride], -1 past the rows
  const int32_t* lane_position;   // [lane_stride], -1 past the lanes
  int32_t first_position;         // the least position of the rows
  const int64_t* vision_offset;   // [vision] where a key is in k
  const int64_t* text_offset;     // [text]
  const int32_t* vision_position;
  const int32_t* text_position;
  const float* lse;           // null: made here
  int64_t lse_head;           // its stride of heads
  const int64_t* lse_offset;  // [rows]

  // Workspace
  int64_t first_head, block_heads;  // the key heads of this round
  float* query;                     // [kv_heads, dim * lane_stride] scaled rows in tiles of vectors, see pack_rows
  float* lane_lse;                  // [kv_heads, lane_stride]
  float*
      stats;  // [block_heads, vision_chunks + text_chunks, 2, lane_stride] maximum (then: factor), sum of exponentials
  float* weights;  // [block_heads, vision_chunks, kChunk, lane_stride] exponentials over their chunk's maximum
  float* mean;     // [vision_chunks, kChunk, row_stride] sum over heads so far

  // Results
  float* total;  // [positions], null where the map is wanted
  float* peak;   // [positions]
  float* map;    // [rows, map_stride], null where the scores are wanted
  int64_t map_stride;
};

struct ScoreTask {
  const ScoreParameters* parameters;
  float* scratch;  // this thread's, scratch_floats(job) of them
};

// One chunk's keys in float32, its scores with one tile of lanes, and where lse is given its weights.
constexpr int64_t kMaxTile = 48;
inline int64_t scratch_floats(const ScoreParameters& p) {
  return kChunk * (p.dim + kMaxTile + (p.lse ? p.lane_stride : 0)) + kLaneStep;
}

}  // namespace mustdrop::cpu

MUSTDROP_CPU_KERNEL(pack_query, ScoreTask)        // items: key heads
MUSTDROP_CPU_KERNEL(score_chunks, ScoreTask)      // items: (key head of the round, chunk): weights and their stats
MUSTDROP_CPU_KERNEL(normalise, ScoreTask)         // items: (key head of the round, kLaneStep lanes): stats to factors
MUSTDROP_CPU_KERNEL(average_heads, ScoreTask)     // items: vision chunks: mean, and at the last head the results
MUSTDROP_CPU_KERNEL(score_normalised, ScoreTask)  // items: vision chunks: all of it where lse is given
