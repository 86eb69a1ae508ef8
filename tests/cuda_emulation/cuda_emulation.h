// SPDX-License-Identifier: Apache-2.0
// CUDA C++ on the host, for tests: the names that kernels use, over the scheduler of scheduler.cpp.
//
// Every thread of a block is a fiber on one operating-system thread. A barrier, a warp operation and a cluster operation
// suspend the fiber; which of the ready fibers runs next is drawn from a seeded generator, so a result that depends on
// the order of the threads changes with the seed. Shared memory is a heap block of exactly the size asked for (an
// AddressSanitizer build sees every access outside it) filled with 0xFF (a float read before it was written is NaN).
// cp.async copies are held back until the thread waits for them. A wait that can never end is reported, not hung on.
// Where the build looks for races (races.h), accesses that no barrier orders are reported whatever the order was.
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

// What a kernel may ask about the thread that runs it.
struct ThreadContext {
  dim3 thread, block, block_size, grid_size;
  unsigned cluster_rank, cluster_size;
  char* shared;           // this block's dynamic shared memory
  unsigned shared_bytes;  // its size
};
const ThreadContext& this_thread();

struct Launch {
  const void* kernel;  // what set_shared_limit() knows it by
  dim3 grid, block;
  unsigned cluster = 1;  // consecutive blocks along x
  size_t shared_bytes = 0;
};

// Runs all blocks to their end; launches from several host threads run one after the other. Throws std::runtime_error: a
// launch that the device would refuse, a thread left while others wait for it, a warp operation whose lanes disagree, a
// wait that never ends, or an index outside the cluster's shared memory.
void run(const Launch& launch, const std::function<void()>& kernel);

// The device that is played: compute capability times ten (80, 90, ...), which decides whether there are clusters.
int capability();
int device();        // its index: each capability is a device of its own
int shared_limit();  // bytes of shared memory that a block of it may ask for
int multiprocessors();

// cudaFuncSetAttribute(kernel, MaxDynamicSharedMemorySize, bytes): the kernel keeps it on this device, whichever host thread
// launches it next. Other host threads may run before this returns. Without it a kernel may have 48 KiB.
void set_shared_limit(const void* kernel, size_t bytes);

[[noreturn]] void fail(const std::string& what);  // ends the launch with this error; called by a thread
void pause();                                     // lets other threads run; for loops that wait on memory
void block_barrier();
void cluster_arrive();
void cluster_wait();
char* cluster_shared(void* mine, unsigned rank);  // where block `rank` of the cluster has what is at `mine` here

// Every lane of `mask` hands in `bytes` bytes and gets those of all lanes: in + out[32 * bytes]. `what` names the operation.
void warp_exchange(const char* what, unsigned mask, const void* in, size_t bytes, void* out);

void atomic_access(const void* address, size_t bytes);  // for the race detector
void publish(int32_t* flag);                            // sets it; what came before the block's last barrier is done
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

// The kernels by name, for launches that come with a name and a pointer to each parameter: what the driver is given.
struct Kernel {
  const char* signature;  // ends in "kKernel = mustdrop::score_kernel<float, 1>]"
  void (*play)(void** parameters);
  Kernel* next;
};
inline Kernel*& first_kernel() {
  static Kernel* first = nullptr;
  return first;
}

template <class... Parameters, size_t... kIndex>
void play(void (*kernel)(Parameters...), void** parameters, std::index_sequence<kIndex...>) {
  kernel(*static_cast<Parameters*>(parameters[kIndex])...);
}
template <class... Parameters>
auto places(void (*)(Parameters...)) {
  return std::index_sequence_for<Parameters...>{};
}
template <auto kKernel>
Kernel* register_kernel() {
  static Kernel kernel{__PRETTY_FUNCTION__, [](void** p) { play(kKernel, p, places(kKernel)); }, first_kernel()};
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
