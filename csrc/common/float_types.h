// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as storage, converted to float32 and back (round to nearest, ties to even).
//
// Without std:: and torch, so each CPU level compiles its own copy. The conversions are plain integer code, which
// vectorizes, where the level has no instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// Calls visit with a value of the C++ type of the elements; only its type matters.
template <class Visit>
inline void with_element(Element element, const Visit& visit) {
  switch (element) {
    case Element::f32:
      return visit(float{});
    case Element::f16:
      return visit(half{});
    case Element::bf16:
      return visit(bfloat16{});
  }
}

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float v) { return v; }

inline float to_float(bfloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

inline float to_float(half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
  __fp16 h;
  memcpy(&h, &v.bits, sizeof h);
  return static_cast<float>(h);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // inf, NaN
  const float scaled = bits_to_float((rest << 13)) * bits_to_float(0x77800000u);            // * 2^112: exact
  return bits_to_float(sign | float_to_bits(scaled));
#endif
}

inline void from_float(float v, float& out) { out = v; }

inline void from_float(float v, bfloat16& out) {
  const uint32_t bits = float_to_bits(v);
  out.bits = v != v ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float v, half& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(v, 0);  // to nearest, ties to even
#elif defined(__aarch64__)
  const __fp16 h = static_cast<__fp16>(v);
  memcpy(&out.bits, &h, sizeof h);
#else
  const uint32_t bits = float_to_bits(v);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    out.bits = sign | 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    out.bits = sign | 0x7c00u;  // rounds to infinity
  } else if (rest < 0x38800000u) {
    const float shifted = bits_to_float(rest) + 0.5f;  // subnormal: the addition rounds at 2^-24
    out.bits = sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  } else {
    out.bits = sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
  }
#endif
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
