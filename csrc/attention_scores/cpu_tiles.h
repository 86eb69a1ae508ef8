// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 keys and query rows in AMX tile registers: the products of cpu_pairs.h, with 16 keys x 16 lanes
// and 32 elements of head_dim per instruction. The packed query already has the layout of the right factor's tile.
#pragma once

#include "attention_scores/cpu_kernel.h"
#include "common/cpu_amx.h"
#include "common/cpu_math.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

#if defined(__AVX512F__)

// 16 keys from `first` on as rows at equal distances: in place if they are in k, else copied. Keys past count repeat
// the first one.
struct KeyTile {
  const bfloat16* rows;
  int64_t step;  // elements
};

inline KeyTile key_tile(const bfloat16* k,
                        const int64_t* offset,  // [count]
                        int64_t first, int64_t count, int64_t dim,
                        bfloat16* copied) {  // [kTileKeys, dim]
  const int64_t* at = offset + first;
  bool regular = first + kTileKeys <= count;
  for (int64_t i = 2; regular && i < kTileKeys; ++i) regular = at[i] - at[i - 1] == at[1] - at[0];
  if (regular) return {k + at[0], at[1] - at[0]};
  for (int64_t i = 0; i < kTileKeys; ++i)
    memcpy(copied + i * dim, k + at[first + i < count ? i : 0], dim * sizeof *copied);
  return {copied, dim};
}

// scores = scale * keys . query for one chunk and one tile of lanes; dim is a multiple of kTileDim.
template <int W>
MUSTDROP_AMX_FUNCTION void multiply_tiles(const bfloat16* k,
                                          const int64_t* offset,  // [count] offset of a key [dim] in k
                                          int64_t count,
                                          const float* query,  // [dim / 2, W * kLanes] pairs of bfloat16
                                          int64_t dim, float scale,
                                          bfloat16* copied,  // [kTileKeys, dim]
                                          float* scores) {   // [kChunk, W * kLanes]; past count: unspecified
  static_assert(kLanes == 16 && W <= 3, "a tile is 16 lanes wide");
  constexpr int64_t kRow = W * kLanes;
  amx_configure();
  for (int64_t first = 0; first < count; first += kTileKeys) {
    const KeyTile keys = key_tile(k, offset, first, count, dim, copied);
    amx_zero(0);
    amx_zero(1);
    amx_zero(2);
    for (int64_t d = 0; d < dim; d += kTileDim) {
      const float* lanes = query + d / 2 * kRow;
      amx_load(3, keys.rows + d, keys.step * sizeof *keys.rows);
      amx_load(4, lanes, kRow * sizeof *lanes);
      amx_multiply(0, 3, 4);
      if (W > 1) {
        amx_load(5, lanes + kLanes, kRow * sizeof *lanes);
        amx_multiply(1, 3, 5);
      }
      if (W > 2) {
        amx_load(6, lanes + 2 * kLanes, kRow * sizeof *lanes);
        amx_multiply(2, 3, 6);
      }
    }
    float* to = scores + first * kRow;
    amx_store(0, to, kRow * sizeof *to);
    if (W > 1) amx_store(1, to + kLanes, kRow * sizeof *to);
    if (W > 2) amx_store(2, to + 2 * kLanes, kRow * sizeof *to);
    for (int64_t i = 0; i < kTileKeys * kRow; i += kLanes) store(to + i, scale * load(to + i));
  }
  amx_release();
}

#else

template <int W>
void multiply_tiles(const bfloat16*, const int64_t*, int64_t, const float*, int64_t, float, bfloat16*, float*) {
  __builtin_unreachable();  // tiles are not chosen at this level
}

#endif

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
