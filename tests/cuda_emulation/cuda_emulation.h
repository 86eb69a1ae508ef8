// SPDX-License-Identifier: Apache-2.0
// CUDA C++ on the host, for tests: the CUDA names that kernels use, on the scheduler of scheduler.cpp.
//
// Every thread of a block is a fiber on one operating-system thread. Barriers, warp operations and cluster operations
// suspend the fiber; a seeded generator draws which ready fiber runs next, so a result that depends on the order of the
// threads changes with the seed. Shared memory is a heap block of exactly the requested size (an AddressSanitizer build
// detects every access outside it) filled with 0xFF (a float that is read before it is written is NaN). cp.async copies
// are deferred until the thread waits for them. A wait that can never end is reported and does not hang. Builds that
// detect races (races.h) report accesses that no barrier orders, independent of the schedule.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

#include "common/host_types.h"

#define __global__

namespace cuda_emulation {

// The built-in variables of a running thread, and its block's shared memory.
struct ThreadContext {
  dim3 thread, block, block_size, grid_size;
  unsigned cluster_rank, cluster_size;
  char* shared;           // this block's dynamic shared memory
  unsigned shared_bytes;  // its size
};
const ThreadContext& this_thread();

struct Launch {
  const void* kernel;  // key of set_shared_limit()
  dim3 grid, block;
  unsigned cluster = 1;  // consecutive blocks along x
  size_t shared_bytes = 0;
  bool overlaps = false;  // programmatic dependent launch: may start before the previous launch ends
};

// Runs all blocks to completion; launches from several host threads are serialized. Throws std::runtime_error for a
// launch that the device would refuse, a thread that exits while others wait for it, a warp operation whose lanes
// disagree, a wait that never ends, an address outside the cluster's shared memory, or a thread of an overlapping launch
// that leaves without wait_for_previous().
void run(const Launch& launch, const std::function<void()>& kernel);

// The emulated device: compute capability times ten (80, 90, ...), which decides whether there are clusters.
int capability();
int device();        // its index: each capability is a device of its own
int shared_limit();  // largest shared memory of a block in bytes
int multiprocessors();
int clusters_at_once(unsigned cluster);  // of this size that the device runs together

// cudaFuncSetAttribute(kernel, MaxDynamicSharedMemorySize, bytes): the limit on this device, for launches from all host
// threads. Other host threads may run before this returns. The default is 48 KiB.
void set_shared_limit(const void* kernel, size_t bytes);

[[noreturn]] void fail(const std::string& what);  // ends the launch with this error; called by a thread
void pause();                                     // yields to other threads; for loops that wait on memory
void block_barrier();
void cluster_arrive(bool relaxed = false);
void cluster_wait();
void wait_for_previous();
char* cluster_shared(void* mine, unsigned rank);  // address of `mine` in block `rank` of the cluster

// All-gather over the lanes of `mask`: `bytes` bytes from `in` of each lane to out[32 * bytes]. `what` names the
// operation.
void warp_exchange(const char* what, unsigned mask, const void* in, size_t bytes, void* out);

void atomic_access(const void* address, size_t bytes);  // for the race detector
void publish(int32_t* flag);                            // sets it with release semantics, as publish() of device.cuh
void wait_published(const int32_t* flag);

void copy_later(void* to, const void* from, unsigned bytes, unsigned size);  // `size` bytes, zero past `bytes`
void copies_commit();
void copies_wait(unsigned groups_left);

template <class T>
std::array<T, 32> lanes(const char* what, unsigned mask, T value) {
  std::array<T, 32> all;
  warp_exchange(what, mask, &value, sizeof(T), all.data());
  return all;
}

// Kernels by name, for launches with a name and a pointer to each parameter, as the driver's.
struct Kernel {
  const char* signature;  // ends in "kKernel = mustdrop::score_kernel<float, 1>]"
  void (*call)(void** parameters);
  Kernel* next;
};
inline Kernel*& first_kernel() {
  static Kernel* first = nullptr;
  return first;
}

template <class... Parameters, size_t... kIndex>
void call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<kIndex...>) {
  kernel(*static_cast<Parameters*>(parameters[kIndex])...);
}
template <class... Parameters>
auto places(void (*)(Parameters...)) {
  return std::index_sequence_for<Parameters...>{};
}
template <auto kKernel>
Kernel* register_kernel() {
  static Kernel kernel{__PRETTY_FUNCTION__, [](void** p) { call(kKernel, p, places(kKernel)); }, first_kernel()};
  return first_kernel() = &kernel;
}
template <auto kKernel>
inline Kernel* const registration = register_kernel<kKernel>();

template <auto kKernel>
auto registered() {
  static_cast<void>(registration<kKernel>);
  return kKernel;
}

inline unsigned linear_thread() {
  const ThreadContext& h = this_thread();
  return h.thread.x + h.block_size.x * (h.thread.y + h.block_size.y * h.thread.z);
}
inline unsigned lane() { return linear_thread() & 31; }

template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned from, bool inside) {
  const auto all = lanes(what, mask, value);
  if (!inside) return value;
  if (!(mask >> (from & 31) & 1)) fail(std::string(what) + " reads a lane that is not in the mask");
  return all[from & 31];
}

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::this_thread().thread)
#define blockIdx (cuda_emulation::this_thread().block)
#define blockDim (cuda_emulation::this_thread().block_size)
#define gridDim (cuda_emulation::this_thread().grid_size)

inline void __syncthreads() { cuda_emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulation::lanes("__syncwarp", mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_emulation::shuffle("__shfl_sync", mask, value, static_cast<unsigned>(from), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, cuda_emulation::lane() ^ bits, true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = cuda_emulation::lane();
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, lane - delta, lane >= delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = cuda_emulation::lane();
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, lane + delta, lane + delta < 32);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = cuda_emulation::lanes("__ballot_sync", mask, predicate);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= (mask >> i & 1u && all[i]) ? 1u << i : 0u;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  const auto all = cuda_emulation::lanes("__match_any_sync", mask, value);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= (mask >> i & 1u && all[i] == value) ? 1u << i : 0u;
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const auto all = cuda_emulation::lanes("__reduce_add_sync", mask, value);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result += mask >> i & 1u ? all[i] : 0u;
  return result;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }

template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  cuda_emulation::pause();  // other threads may come first
  cuda_emulation::atomic_access(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
