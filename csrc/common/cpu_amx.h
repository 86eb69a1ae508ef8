// SPDX-License-Identifier: Apache-2.0
// AMX tile registers, 16 rows of 64 bytes each. A tile's number must be a literal.
//
// With MUSTDROP_AMX_PLAIN they are plain C++ with the arithmetic of Intel's Software Developer's Manual, for tests on
// machines without AMX.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(MUSTDROP_AMX_PLAIN)

#define MUSTDROP_AMX_FUNCTION
#define amx_configure()
#define amx_release()
#define amx_zero(TILE) amx_plain::zero(TILE)
#define amx_load(TILE, FROM, STEP) amx_plain::load(TILE, FROM, STEP)
#define amx_store(TILE, TO, STEP) amx_plain::store(TILE, TO, STEP)
#define amx_multiply(SUM, LEFT, RIGHT) amx_plain::multiply(SUM, LEFT, RIGHT)

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL::amx_plain {

constexpr int kRows = 16, kBytes = 64, kPairs = 16;

inline thread_local unsigned char tiles[8][kRows][kBytes];

inline void zero(int tile) { memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void load(int tile, const void* from, int64_t step) {
  for (int row = 0; row < kRows; ++row)
    memcpy(tiles[tile][row], static_cast<const unsigned char*>(from) + row * step, kBytes);
}

inline void store(int tile, void* to, int64_t step) {
  for (int row = 0; row < kRows; ++row) memcpy(static_cast<unsigned char*>(to) + row * step, tiles[tile][row], kBytes);
}

// Flushes subnormal numbers to zero, inputs and results.
inline float flushed(float value) { return __builtin_fabsf(value) < 1.17549435e-38f ? 0.0f * value : value; }

inline float bfloat16_at(const unsigned char* from) {
  uint16_t half;
  memcpy(&half, from, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

// sum[m][n] += left[m][2k] * right[k][2n] + left[m][2k + 1] * right[k][2n + 1] over k; even and odd products are summed
// separately.
inline void multiply(int sum, int left, int right) {
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kPairs; ++n) {
      float even = 0.0f, odd = 0.0f, old;
      for (int k = 0; k < kPairs; ++k) {
        const unsigned char *a = tiles[left][m] + 4 * k, *b = tiles[right][k] + 4 * n;
        even = flushed(even + bfloat16_at(a) * bfloat16_at(b));
        odd = flushed(odd + bfloat16_at(a + 2) * bfloat16_at(b + 2));
      }
      memcpy(&old, tiles[sum][m] + 4 * n, sizeof old);
      const float value = flushed(old + flushed(even + odd));
      memcpy(tiles[sum][m] + 4 * n, &value, sizeof value);
    }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL::amx_plain

#elif defined(__AVX512F__)

#include <immintrin.h>

#define MUSTDROP_AMX_FUNCTION __attribute__((target("amx-tile,amx-bf16")))
#define amx_configure() _tile_loadconfig(&kAmxTiles)
#define amx_release() _tile_release()
#define amx_zero(TILE) _tile_zero(TILE)
#define amx_load(TILE, FROM, STEP) _tile_loadd(TILE, FROM, STEP)
#define amx_store(TILE, TO, STEP) _tile_stored(TILE, TO, STEP)
#define amx_multiply(SUM, LEFT, RIGHT) _tile_dpbf16ps(SUM, LEFT, RIGHT)

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

// Palette 1: eight tiles of full size.
struct AmxTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64}, reserved_bytes[8] = {};
  uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16}, reserved_rows[8] = {};
};
static_assert(sizeof(AmxTiles) == 64, "as the instruction reads it");
alignas(64) static const AmxTiles kAmxTiles;

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL

#endif
