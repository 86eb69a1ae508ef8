// SPDX-License-Identifier: Apache-2.0
// Dot products of one float32 vector with rows of any float type, for work that is bound by reading the rows.
#pragma once

#include "common/cpu_math.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {

constexpr int kDotRows = 4;  // computed side by side

// out[i * step] = x . row[i] for N rows.
template <int N, class T>
inline void dot_rows(const float* x,            // [dim]
                     const T* const (&row)[N],  // [N, dim]
                     int64_t dim, float* out, int64_t step) {
  VecFloat sums[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sums[i] = VecFloat{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const VecFloat part = load(x + d);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sums[i] += part * load(row[i] + d);
  }
  if (d < dim) {
    const VecFloat part = load_part(x + d, dim - d);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sums[i] += part * load_part(row[i] + d, dim - d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) out[i * step] = sum_of(sums[i]);
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
