// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 keys and query rows with AVX512-BF16, which multiplies pairs of bfloat16 and adds in float32.
//
// Products are exact and sums float32; the instruction flushes numbers below 1.2e-38 to zero.
#pragma once

#include "common/cpu_math.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

#if defined(__AVX512F__)

// scores = scale * keys . query for one chunk and one tile, K keys at a time.
template <int K, int W>
__attribute__((target("avx512bf16"))) void multiply_pairs(
    const bfloat16* k,
    const int64_t* offset,  // [count] offset of a key [dim] in k
    int64_t count,
    const float* query,  // [dim / 2, W * kLanes] pairs of bfloat16
    int64_t dim, float scale,
    float* scores) {  // [kChunk, W * kLanes]; past count: unspecified
  for (int64_t first = 0; first < count; first += K) {
    const bfloat16* keys[K];
    __m512 sums[K][W];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      keys[i] = k + offset[first + i < count ? first + i : first];
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) sums[i][w] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < dim; d += 2) {
      __m512bh q[W];
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) q[w] = (__m512bh)_mm512_loadu_ps(query + (d / 2 * W + w) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
        int32_t pair;
        memcpy(&pair, keys[i] + d, sizeof pair);
        const __m512bh key = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
        for (int w = 0; w < W; ++w) sums[i][w] = _mm512_dpbf16_ps(sums[i][w], key, q[w]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w)
        _mm512_storeu_ps(scores + ((first + i) * W + w) * kLanes, _mm512_mul_ps(sums[i][w], _mm512_set1_ps(scale)));
  }
}

#else

template <int K, int W>
void multiply_pairs(const bfloat16*, const int64_t*, int64_t, const float*, int64_t, float, float*) {
  __builtin_unreachable();  // no job of this level is paired
}

#endif

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
