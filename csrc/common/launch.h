// SPDX-License-Identifier: Apache-2.0
// Device access of the CUDA operators: device guard, current stream, device properties, kernel launches.
//
// The launchers are compiled in three ways: by nvcc; for kernels that NVRTC compiles (MUSTDROP_LAUNCHERS_ONLY,
// launch_nvrtc.h); and for the host emulation of the tests (MUSTDROP_CUDA_EMULATED).
#pragma once

#include <array>
#include <atomic>
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
  unsigned cluster = 1;     // consecutive blocks along x of a cluster; needs has_clusters()
  bool overlaps = false;    // may start before the stream's previous launch ends: see wait_for_previous()
};

struct DeviceFacts {
  int capability;       // times ten: 80, 90, ...
  int multiprocessors;  // of the device
  int shared_bytes;     // the most of a block
};

inline bool has_clusters(const DeviceFacts& facts) { return facts.capability >= 90; }
inline bool has_dependent_launches(const DeviceFacts& facts) { return facts.capability >= 90; }

constexpr int kKnownDevices = 64;  // devices with cached properties

// The clusters of a kernel that a device runs together, by device and size of the cluster.
class ResidentClusters {
 public:
  template <class Query>
  int get(int device, unsigned cluster, const Query& query) {
    if (device < 0 || device >= kKnownDevices) return query();
    std::atomic<int>& known = known_[device][cluster - 1];
    if (known.load(std::memory_order_relaxed) == 0) known.store(query() + 1, std::memory_order_relaxed);
    return known.load(std::memory_order_relaxed) - 1;
  }

 private:
  std::array<std::array<std::atomic<int>, kMostCluster>, kKnownDevices> known_{};  // plus one; 0: unknown
};

}  // namespace mustdrop

#if defined(MUSTDROP_LAUNCHERS_ONLY)
#include "common/launch_nvrtc.h"
#endif

namespace mustdrop {

#if !defined(MUSTDROP_LAUNCHERS_ONLY)

// What the process knows about a kernel on each device.
//
// The limit on a kernel's dynamic shared memory is an attribute of the kernel on a device, not of a launch. Threads
// that set it to the size of their own launch would overwrite each other's limit, so it is set once, to the device's
// maximum.
class KernelState {
 public:
  template <class Raise>
  void raise_limit_once(int device, const Raise& raise) {
    if (device < kKnownDevices)
      std::call_once(raised_[device], raise);
    else
      raise();
  }
  ResidentClusters clusters;

 private:
  std::array<std::once_flag, kKnownDevices> raised_;
};

template <auto kKernel>
inline KernelState kernel_state;

// A kernel for Device::launch: MUSTDROP_KERNEL(score_kernel<T, M>).
template <class... Parameters>
struct Kernel {
  void (*function)(Parameters...);
  KernelState* state;
  const void* address() const { return reinterpret_cast<const void*>(function); }
};
template <auto kKernel, class... Parameters>
Kernel<Parameters...> limited_kernel(void (*function)(Parameters...)) {
  return {function, &kernel_state<kKernel>};
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
    kernel.state->raise_limit_once(cuda_emulation::device(),
                                   [&] { cuda_emulation::set_shared_limit(kernel.address(), facts().shared_bytes); });
    cuda_emulation::run({kernel.address(), grid.blocks, dim3(grid.threads), grid.cluster, grid.shared_bytes,
                         grid.overlaps && has_dependent_launches(facts())},
                        [&] { kernel.function(arguments...); });
  }

  template <class... Parameters>
  int clusters_at_once(const Grid& grid, const Kernel<Parameters...>&) const {
    return cuda_emulation::clusters_at_once(grid.cluster);
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

// Without code of its own the device runs the PTX of an older architecture; then that architecture decides.
inline int architecture_of_code() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, architecture_probe<0>), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

inline DeviceFacts read_device_facts(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  const int device = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  return {std::min(device, architecture_of_code()), attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Makes the tensor's device current during its lifetime and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  DeviceFacts facts() const {
    static std::array<std::once_flag, kKnownDevices> once;
    static std::array<DeviceFacts, kKnownDevices> facts;
    if (index_ >= kKnownDevices) return read_device_facts(index_);
    std::call_once(once[index_], [this] { facts[index_] = read_device_facts(index_); });
    return facts[index_];
  }

  // The clusters of the grid's size that the device runs together; 0 if it runs none.
  template <class... Parameters>
  int clusters_at_once(const Grid& grid, const Kernel<Parameters...>& kernel) const {
    kernel.state->raise_limit_once(index_, [&] { allow_most_shared_memory(kernel.address()); });
    return kernel.state->clusters.get(index_, grid.cluster, [&] {
      const Configuration configuration(grid, nullptr, false);
      int count = 0;
      check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel.function, &configuration.config),
                 "cudaOccupancyMaxActiveClusters");
      return count;
    });
  }

  template <class... Parameters, class... Arguments>
  void launch(const Grid& grid, const Kernel<Parameters...>& kernel, const Arguments&... arguments) const {
    kernel.state->raise_limit_once(index_, [&] { allow_most_shared_memory(kernel.address()); });
    const Configuration configuration(grid, stream_, grid.overlaps && has_dependent_launches(facts()));
    check_cuda(cudaLaunchKernelEx(&configuration.config, kernel.function, arguments...), "launch");
  }

 private:
  // Arguments of the runtime for a grid.
  struct Configuration {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};

    Configuration(const Grid& grid, cudaStream_t stream, bool overlaps) {
      config.gridDim = grid.blocks;
      config.blockDim = dim3(grid.threads);
      config.dynamicSmemBytes = grid.shared_bytes;
      config.stream = stream;
      config.attrs = attributes;
      if (grid.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {grid.cluster, 1, 1};
      }
      if (overlaps) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      }
    }
    Configuration(const Configuration&) = delete;
  };

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

// The number of blocks along one axis of a grid.
inline unsigned blocks(int64_t count) {
  if (count > INT_MAX) throw std::runtime_error("mustdrop: a tensor is too large for one launch");
  return static_cast<unsigned>(count);
}

// Calls f with a null pointer to the element type: with_float_type(type, [&](auto* p) {...}).
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

// One allocation for the intermediate results of a launcher's kernels, each 16-byte aligned.
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

// Whether every row begins and ends at a multiple of 16 bytes.
inline bool aligned16(const Tensor& t, int64_t last_size) {
  const int64_t size = t.element_size();
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 || last_size * size % 16) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) * size % 16) return false;
  return true;
}

}  // namespace mustdrop
