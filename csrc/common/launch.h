// SPDX-License-Identifier: Apache-2.0
// How the CUDA operators reach the device: guard, current stream, device facts, one launch function.
//
// The same launchers are compiled three times: by nvcc, with kernels that another compiler makes (MUSTDROP_LAUNCHERS_ONLY,
// launch_nvrtc.h), and by the tests for the host (MUSTDROP_CUDA_EMULATED): there a launch runs the emulation.
#pragma once

#include <array>
#include <climits>
#include <mutex>

#include "common/device.cuh"
#include "common/stable.h"

#if !defined(MUSTDROP_CUDA_EMULATED) && !defined(MUSTDROP_LAUNCHERS_ONLY)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace mustdrop {

struct Grid {
  dim3 blocks;
  unsigned threads;         // of a block
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;     // consecutive blocks along x that work together; needs has_clusters()
};

struct DeviceFacts {
  int capability;       // times ten: 80, 90, ...
  int multiprocessors;  // on the whole device
  int shared_bytes;     // that a block may ask for
};

constexpr int kKnownDevices = 64;  // what is remembered per device is remembered for so many

}  // namespace mustdrop

#if defined(MUSTDROP_LAUNCHERS_ONLY)
#include "common/launch_nvrtc.h"
#endif

namespace mustdrop {

#if !defined(MUSTDROP_LAUNCHERS_ONLY)

// The dynamic shared memory that a kernel may be launched with is an attribute of the kernel on a device, not of a launch.
// Two threads that each set it to the size of their own launch undo each other's, so it is set once, to the most that the
// device has.
class SharedMemoryLimit {
 public:
  template <class Raise>
  void raise_once(int device, const Raise& raise) {
    if (device < kKnownDevices)
      std::call_once(raised_[device], raise);
    else
      raise();
  }

 private:
  std::array<std::once_flag, kKnownDevices> raised_;
};

template <auto kKernel>
inline SharedMemoryLimit shared_memory_limit;

// A kernel as Device::launch takes it: MUSTDROP_KERNEL(score_kernel<T, M>).
template <class... Parameters>
struct Kernel {
  void (*function)(Parameters...);
  SharedMemoryLimit* limit;
  const void* address() const { return reinterpret_cast<const void*>(function); }
};
template <auto kKernel, class... Parameters>
Kernel<Parameters...> limited_kernel(void (*function)(Parameters...)) {
  return {function, &shared_memory_limit<kKernel>};
}

#endif

#if defined(MUSTDROP_LAUNCHERS_ONLY)
#elif defined(MUSTDROP_CUDA_EMULATED)

#define MUSTDROP_KERNEL(...) ::mustdrop::limited_kernel<__VA_ARGS__>(cuda_emulation::registered<__VA_ARGS__>())

class Device {
 public:
  explicit Device(const Tensor&) {}
  DeviceFacts facts() const {
    return {cuda_emulation::capability(), cuda_emulation::multiprocessors(), cuda_emulation::shared_limit()};
  }

  template <class... Parameters, class... Arguments>
  void launch(const Grid& grid, const Kernel<Parameters...>& kernel, const Arguments&... arguments) const {
    kernel.limit->raise_once(cuda_emulation::device(),
                             [&] { cuda_emulation::set_shared_limit(kernel.address(), facts().shared_bytes); });
    cuda_emulation::run({kernel.address(), grid.blocks, dim3(grid.threads), grid.cluster, grid.shared_bytes},
                        [&] { kernel.function(arguments...); });
  }
};

#else

#define MUSTDROP_KERNEL(...) ::mustdrop::limited_kernel<__VA_ARGS__>(&__VA_ARGS__)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("mustdrop: ") + what + ": " + cudaGetErrorString(error));
}

template <int>
__global__ void architecture_probe() {}

// The device runs PTX of an older architecture where it has no code of its own, so the code's architecture counts.
inline int architecture_of_code() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, architecture_probe<0>), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

inline DeviceFacts ask_device(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  const int device = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  return {std::min(device, architecture_of_code()), attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Makes the tensor's device the current one while it lives, and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  DeviceFacts facts() const {
    static std::array<std::once_flag, kKnownDevices> asked;
    static std::array<DeviceFacts, kKnownDevices> known;
    if (index_ >= kKnownDevices) return ask_device(index_);
    std::call_once(asked[index_], [this] { known[index_] = ask_device(index_); });
    return known[index_];
  }

  template <class... Parameters, class... Arguments>
  void launch(const Grid& grid, const Kernel<Parameters...>& kernel, const Arguments&... arguments) const {
    kernel.limit->raise_once(index_, [&] { allow_most_shared_memory(kernel.address()); });
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {grid.cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel.function, arguments...), "launch");
  }

 private:
  void allow_most_shared_memory(const void* kernel) const {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    const int most = facts().shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#endif

inline bool has_clusters(const DeviceFacts& facts) { return facts.capability >= 90; }

// The number of blocks along one axis of a grid.
inline unsigned blocks(int64_t count) {
  if (count > INT_MAX) throw std::runtime_error("mustdrop: a tensor is too large for one launch");
  return static_cast<unsigned>(count);
}

// Calls f with a null pointer to the element type that is computed with: with_float_type(type, [&](auto* p) {...}).
template <class F>
void with_float_type(ScalarType type, const F& f) {
  if (type == ScalarType::Float) {
    f(static_cast<float*>(nullptr));
  } else if (type == ScalarType::Half) {
    f(static_cast<half_t*>(nullptr));
  } else {
    f(static_cast<bfloat16_t*>(nullptr));
  }
}

// One allocation that a launcher divides among the intermediate results of its kernels, 16-byte aligned each.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : bytes_(bytes), memory_(new_empty(like, {bytes}, ScalarType::Byte)) {}
  static int64_t size(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

  template <class T>
  T* allocate(int64_t count) {
    T* result = reinterpret_cast<T*>(mutable_data<char>(memory_) + used_);
    used_ += size(count * static_cast<int64_t>(sizeof(T)));
    if (used_ > bytes_) throw std::logic_error("mustdrop: a workspace is too small");
    return result;
  }

 private:
  int64_t bytes_, used_ = 0;
  Tensor memory_;
};

// Whether every address that the pointer and these strides (in elements) give is a multiple of 16 bytes.
inline bool aligned16(const Tensor& t, int64_t last_size) {
  const int64_t size = t.element_size();
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 || last_size * size % 16) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) * size % 16) return false;
  return true;
}

}  // namespace mustdrop
