// SPDX-License-Identifier: Apache-2.0
// The one order of all selections as unsigned integers. Internal linkage: every CPU level has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace mustdrop::cpu {

// Rises with the score; -0.0 and +0.0 are equal, NaN is below everything.
static inline uint32_t order_key(float score) {
  const float value = score + 0.0f;  // -0.0 becomes +0.0
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t flip =
      static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;  // all bits of a negative
  return score != score ? 0u : bits ^ flip;
}

}  // namespace mustdrop::cpu
