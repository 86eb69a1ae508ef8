// SPDX-License-Identifier: Apache-2.0
// The order of all selections as unsigned keys: increasing with the score, equal for -0.0 and +0.0, 0 (lowest) for NaN.
// Without std:: and torch, so each CPU level compiles its own copy.
#pragma once

#include "common/float_types.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

inline uint32_t order_key(float score) {
  const uint32_t bits = float_to_bits(score + 0.0f);                                            // -0.0 becomes +0.0
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;  // negative: all bits
  return score != score ? 0u : bits ^ flip;
}

inline uint32_t order_key(bfloat16 score) { return order_key(to_float(score)); }

// Computed from the bits: subnormal numbers, frequent in float16, convert slowly.
inline uint32_t order_key(half score) {
  const uint32_t bits = score.bits, size = bits & 0x7fffu;
  const uint32_t key = bits & 0x8000u ? 0x8000u - size : 0x8000u + size;
  return size > 0x7c00u ? 0u : key << 16;
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
