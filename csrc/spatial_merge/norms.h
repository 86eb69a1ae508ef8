// SPDX-License-Identifier: Apache-2.0
// u = x / max(|x|, 1e-8) of a token whose norm may be beyond float32: |x|^2 overflows above 2^64 and loses its bits below
// 2^-63.
//
// Such a token is scaled by a power of two before it is squared, so its u has the bits that it would have at another
// scale. A token below 2^-63 counts as zero. mustdrop_kernels/backends has the same rule.
#pragma once

#if !defined(MUSTDROP_NORM_FUNCTION)
#define MUSTDROP_NORM_FUNCTION static inline
#endif

namespace mustdrop {

constexpr float kLargeSquare = 0x1p100f, kSmallSquare = 0x1p-80f;  // of norms that float32 squares
constexpr float kLargeScale = 0x1p-100f, kSmallScale = 0x1p60f;    // of other tokens, before they are squared
constexpr float kVanishedSquare = 0x1p-6f;                         // (2^-63 kSmallScale)^2
constexpr float kUnit = 0x1p24f;    // |u| in sums, so that the weight of the largest token is a normal number
constexpr float kShare = 0x1p-12f;  // of sizes in weighted sums, which stay in float32 up to a size of 4,096 then

// weight: kUnit / max(|x|, 1e-8); square: |u|^2.
struct TokenUnit {
  float weight, square;
};

// The scale at which a token is squared, given its |x|^2 in float32.
MUSTDROP_NORM_FUNCTION float norm_scale(float square) {
  return square > kLargeSquare ? kLargeScale : square < kSmallSquare ? kSmallScale : 1.0f;
}

// `square`: |scale x|^2 in float32.
MUSTDROP_NORM_FUNCTION TokenUnit token_unit(float square, float scale) {
  if (scale > 1.0f && square < kVanishedSquare) return {0.0f, 0.0f};
  const float norm = sqrtf(square), least = 1e-8f * scale;
  const float inverse = 1.0f / (norm < least ? least : norm);
  return {inverse * (scale * kUnit), square * inverse * inverse};
}

}  // namespace mustdrop
