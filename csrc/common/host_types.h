// SPDX-License-Identifier: Apache-2.0
// CUDA's qualifiers and vector types for a host compiler. host_names.h declares the remaining names for builds of the
// launchers alone; the emulation of the tests defines them.
#pragma once

#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
