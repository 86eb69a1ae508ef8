// SPDX-License-Identifier: Apache-2.0
// Vectors of the level's width, and the exponential function on them.
//
// Written with vector extensions (GCC, Clang): one source for AVX-512, AVX2, SSE2 and NEON. Intrinsics, with a plain
// alternative, only where no vector expression compiles to the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/float_types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecFloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));

inline VecFloat splat(float value) { return value - VecFloat{}; }

template <class Vector, class T>
inline Vector load_as(const T* from) {  // [kLanes], at any address
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline VecFloat load(const float* from) { return load_as<VecFloat>(from); }

inline VecFloat load(const bfloat16* from) {
  return reinterpret_cast<VecFloat>(__builtin_convertvector(load_as<VecHalf>(from), VecBits) << 16);
}

inline VecFloat load(const half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecFloat>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<VecFloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  VecFloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

// The first n < kLanes elements, then zeros.
template <class T>
inline VecFloat load_part(const T* from, int64_t n) {
  VecFloat v{};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(from[i]);
  return v;
}

inline void store(float* to, VecFloat v) { memcpy(to, &v, sizeof v); }

// Non-temporal store: bypasses the caches, which would first read the line. `at` is aligned to a vector. Other threads
// may read it after end_streams().
inline void stream(char* at, VecFloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(at), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(at), reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(at), reinterpret_cast<__m128>(v));
#else
  memcpy(at, &v, sizeof v);
#endif
}

inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Bytes that can be streamed to `to`: whole vectors if it is aligned, else 0.
inline int64_t streamable(const void* to, int64_t bytes) {
  constexpr int64_t kStep = sizeof(VecFloat);
  return reinterpret_cast<uintptr_t>(to) % kStep == 0 ? bytes / kStep * kStep : 0;
}

inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  const int64_t whole = streamable(to, bytes);
  for (int64_t i = 0; i < whole; i += sizeof(VecFloat))
    stream(static_cast<char*>(to) + i, load_as<VecFloat>(static_cast<const char*>(from) + i));
  if (whole < bytes) memcpy(static_cast<char*>(to) + whole, static_cast<const char*>(from) + whole, bytes - whole);
}

inline void stream_zeros(void* to, int64_t bytes) {
  const int64_t whole = streamable(to, bytes);
  for (int64_t i = 0; i < whole; i += sizeof(VecFloat)) stream(static_cast<char*>(to) + i, VecFloat{});
  if (whole < bytes) memset(static_cast<char*>(to) + whole, 0, bytes - whole);
}

// Maximum; a where b is NaN.
inline VecFloat larger(VecFloat a, VecFloat b) { return b > a ? b : a; }

// Maximum, NaN where either is NaN.
inline VecFloat larger_or_nan(VecFloat a, VecFloat b) { return (b > a) | (b != b) ? b : a; }

typedef float VecFour __attribute__((vector_size(16)));

template <class Half, class Vector>
inline Half add_halves(Vector v) {
  Half half[2];
  memcpy(half, &v, sizeof v);
  return half[0] + half[1];
}

// Sum of all lanes, in an order that depends only on the level.
inline float sum_of(VecFloat v) {
#if defined(__AVX512F__)
  typedef float VecEight __attribute__((vector_size(32)));
  const VecFour four = add_halves<VecFour>(add_halves<VecEight>(v));
#elif defined(__AVX2__)
  const VecFour four = add_halves<VecFour>(v);
#else
  const VecFour four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x, within 1.01 ulp; 0 below -86.9, where the result would be subnormal; infinity above 88.73; NaN for NaN.
inline VecFloat exp_of(VecFloat x) {
  const VecFloat low = splat(-86.9f), high = splat(88.8f);
  const VecFloat shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const VecFloat capped = x > high ? high : x;
  const VecFloat shifted = capped * 1.44269504f + shift;
  const VecFloat n = shifted - shift;
  const VecFloat r = (capped - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n ln 2, |r| <= ln 2 / 2
  VecFloat p = 0.00138145394f * r + 0.00836874545f;  // minimax of (e^r - 1 - r) / r^2, off by 3e-9 of e^r
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  const VecFloat half_power = reinterpret_cast<VecFloat>((reinterpret_cast<VecInt>(shifted) + 126) << 23);  // 2^(n-1)
  return x < low ? VecFloat{} : (p + p) * half_power;
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
