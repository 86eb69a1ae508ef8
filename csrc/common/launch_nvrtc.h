// SPDX-License-Identifier: Apache-2.0
// Launches of kernels that somebody else compiles (MUSTDROP_LAUNCHERS_ONLY): the backend `cupy` hands in functions that find
// a kernel by its name and launch it. No header and no library of CUDA is needed to build this.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "common/driver.h"

namespace mustdrop {

// What Python hands in. Functions that return text return null where all is well, else what is wrong.
struct LaunchHooks {
  const char* (*facts)(int device, int* facts);  // capability, multiprocessors, shared_bytes
  const char* (*find)(int device, const char* signature, void** function);
  const char* (*make_current)(int device);
  int (*current_stream)(int device, void** stream);  // aoti_torch_get_current_cuda_stream
  int (*launch)(const DriverConfig*, void* function, void** parameters, void** extra);  // cuLaunchKernelEx
};

inline LaunchHooks& launch_hooks() {
  static LaunchHooks hooks{};
  return hooks;
}

inline void check_hook(const char* problem) {
  if (problem) throw std::runtime_error(std::string("mustdrop: ") + problem);
}

// A kernel by name, and where it is on each device. All of them are in one list.
struct KernelName {
  const char* signature;  // ends in "... = score_kernel<float, 1>]"
  std::array<std::atomic<void*>, kKnownDevices> functions{};
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
    check_hook(launch_hooks().find(device, signature, &function));
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

// Makes the tensor's device the current one while it lives, and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& like) : index_(like.get_device_index()) {
    if (index_ >= 0) guard_.emplace(index_);  // tests hand in tensors of the CPU
    if (!launch_hooks().launch) throw std::runtime_error("mustdrop: nobody has connected the launchers");
    if (launch_hooks().current_stream(index_, &stream_)) throw std::runtime_error("mustdrop: torch has no stream");
  }

  DeviceFacts facts() const {
    static std::array<std::once_flag, kKnownDevices> asked;
    static std::array<DeviceFacts, kKnownDevices> known;
    if (index_ < 0 || index_ >= kKnownDevices) return ask();
    std::call_once(asked[index_], [this] { known[index_] = ask(); });
    return known[index_];
  }

  template <class... Parameters>
  void launch(const Grid& grid, NamedKernel<Parameters...> kernel, const Parameters&... parameters) const {
    void* function = kernel.name->on(index_);
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    DriverAttribute cluster{kClusterDimension, {grid.cluster, 1, 1}};
    const DriverConfig config{{grid.blocks.x, grid.blocks.y, grid.blocks.z},
                              {grid.threads, 1, 1},
                              static_cast<unsigned>(grid.shared_bytes),
                              stream_,
                              &cluster,
                              grid.cluster > 1 ? 1u : 0u};
    int error = launch_hooks().launch(&config, function, pointers, nullptr);
    if (error == kInvalidContext) {
      check_hook(launch_hooks().make_current(index_));
      error = launch_hooks().launch(&config, function, pointers, nullptr);
    }
    if (error)
      throw std::runtime_error(std::string("mustdrop: launch of ") + kernel.name->signature + ": CUDA driver error " +
                               std::to_string(error));
  }

 private:
  DeviceFacts ask() const {
    int facts[3];
    check_hook(launch_hooks().facts(index_, facts));
    return {facts[0], facts[1], facts[2]};
  }

  int index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace mustdrop
