// SPDX-License-Identifier: Apache-2.0
// Arguments of cuLaunchKernelEx, with the layout of cuda.h (checked by tests/backends/test_cupy.py).
#pragma once

namespace mustdrop {

struct DriverAttribute {  // CUlaunchAttribute
  unsigned id;
  alignas(8) unsigned value[16];
};
struct DriverConfig {  // CUlaunchConfig
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  void* stream;
  DriverAttribute* attributes;
  unsigned attribute_count;
};
constexpr unsigned kClusterDimension = 4;           // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr unsigned kProgrammaticSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT: a thread without a context on the device

}  // namespace mustdrop
