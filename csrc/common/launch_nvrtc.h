// SPDX-License-Identifier: Apache-2.0
// Launches of kernels that NVRTC compiles (MUSTDROP_LAUNCHERS_ONLY): the backend `cupy` sets functions that find a
// kernel by its name and launch it. Builds without CUDA's headers and libraries.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/driver.h"

namespace mustdrop {

// Functions set by Python. Those that return text return null, or an error message.
struct LaunchHooks {
  const char* (*facts)(int device, int* facts);  // capability, multiprocessors, shared_bytes
  const char* (*find)(int device, const char* signature, void** function);
  const char* (*make_current)(int device);
  int (*current_stream)(int device, void** stream);  // aoti_torch_get_current_cuda_stream
  int (*launch)(const DriverConfig*, void* function, void** parameters, void** extra);  // cuLaunchKernelEx
  int (*count_clusters)(int* count, void* function, const DriverConfig*);               // cuOccupancyMaxActiveClusters
};

inline LaunchHooks& launch_hooks() {
  static LaunchHooks hooks{};
  return hooks;
}

// Throws unless `problem` is null.
inline void throw_problem(const char* problem) {
  if (problem) throw std::runtime_error(std::string("mustdrop: ") + problem);
}

// A kernel's name and its function on each device. All kernels are in one linked list.
struct KernelName {
  const char* signature;  // ends in "... = score_kernel<float, 1>]"
  std::array<std::atomic<void*>, kKnownDevices> functions{};
  ResidentClusters clusters;
  KernelName* next;

  static KernelName*& first() {
    static KernelName* head = nullptr;
    return head;
  }
  explicit KernelName(const char* text) : signature(text), next(first()) { first() = this; }

  void* on(int device) {
    const bool known = device >= 0 && device < kKnownDevices;
    void* function = known ? functions[device].load(std::memory_order_acquire) : nullptr;
    if (function) return function;
    throw_problem(launch_hooks().find(device, signature, &function));
    if (known) functions[device].store(function, std::memory_order_release);
    return function;
  }
};

template <auto kKernel>
const char* kernel_signature() {
  return __PRETTY_FUNCTION__;
}
template <auto kKernel>
inline KernelName kernel_name{kernel_signature<kKernel>()};

template <class... Parameters>
struct NamedKernel {
  KernelName* name;
};
template <auto kKernel, class... Parameters>
NamedKernel<Parameters...> named_kernel(void (*)(Parameters...)) {
  return {&kernel_name<kKernel>};
}
#define MUSTDROP_KERNEL(...) ::mustdrop::named_kernel<__VA_ARGS__>(static_cast<decltype(&__VA_ARGS__)>(nullptr))

// Makes the tensor's device current during its lifetime and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : index_(like.get_device_index()) {
    if (index_ >= 0) guard_.emplace(index_);  // tests use CPU tensors
    if (!launch_hooks().launch) throw std::runtime_error("mustdrop: the launchers are not connected");
    if (launch_hooks().current_stream(index_, &stream_)) throw std::runtime_error("mustdrop: torch has no stream");
  }

  DeviceFacts facts() const {
    static std::array<std::once_flag, kKnownDevices> once;
    static std::array<DeviceFacts, kKnownDevices> facts;
    if (index_ < 0 || index_ >= kKnownDevices) return read_facts();
    std::call_once(once[index_], [this] { facts[index_] = read_facts(); });
    return facts[index_];
  }

  // The clusters of the grid's size that the device runs together; 0 if it runs none.
  template <class... Parameters>
  int clusters_at_once(const Grid& grid, NamedKernel<Parameters...> kernel) const {
    return kernel.name->clusters.get(index_, grid.cluster, [&] {
      int count = 0;
      Configuration configuration(grid, nullptr, false);
      call(*kernel.name, "occupancy",
           [&](void* function) { return launch_hooks().count_clusters(&count, function, &configuration.config); });
      return count;
    });
  }

  template <class... Parameters>
  void launch(const Grid& grid, NamedKernel<Parameters...> kernel, const Parameters&... parameters) const {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    Configuration configuration(grid, stream_, grid.overlaps && has_dependent_launches(facts()));
    call(*kernel.name, "launch",
         [&](void* function) { return launch_hooks().launch(&configuration.config, function, pointers, nullptr); });
  }

 private:
  // Arguments of the driver for a grid.
  struct Configuration {
    DriverAttribute attributes[2]{};
    DriverConfig config;

    Configuration(const Grid& grid, void* stream, bool overlaps)
        : config{{grid.blocks.x, grid.blocks.y, grid.blocks.z},
                 {grid.threads, 1, 1},
                 static_cast<unsigned>(grid.shared_bytes),
                 stream,
                 attributes,
                 0} {
      if (grid.cluster > 1) attributes[config.attribute_count++] = {kClusterDimension, {grid.cluster, 1, 1}};
      if (overlaps) attributes[config.attribute_count++] = {kProgrammaticSerialization, {1}};
    }
    Configuration(const Configuration&) = delete;
  };

  // Calls the driver with a kernel's function; again if this thread had no context.
  template <class F>
  void call(KernelName& name, const char* what, const F& driver) const {
    void* function = name.on(index_);
    int error = driver(function);
    if (error == kInvalidContext) {
      throw_problem(launch_hooks().make_current(index_));
      error = driver(function);
    }
    if (error)
      throw std::runtime_error(std::string("mustdrop: ") + what + " of " + name.signature + ": CUDA driver error " +
                               std::to_string(error));
  }

  DeviceFacts read_facts() const {
    int facts[3];
    throw_problem(launch_hooks().facts(index_, facts));
    return {facts[0], facts[1], facts[2]};
  }

  int index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace mustdrop
