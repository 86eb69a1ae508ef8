// SPDX-License-Identifier: Apache-2.0
// Small kernels, each correct and with one planted bug, for the tests of the emulation.
#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/device.cuh"

namespace mustdrop {
namespace {

constexpr int kThreads = 128;

template <bool kRight>
void barrier() {
  if constexpr (kRight) __syncthreads();
}

// out = in, reversed; without the barrier a thread reads elements before they are written.
template <bool kRight>
void reverse_kernel(const int* in,  // [kThreads]
                    int* out) {     // [kThreads]
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  held[threadIdx.x] = in[threadIdx.x];
  barrier<kRight>();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

// out = the block's sum of in, and of in + 1; without the barrier the second sum's parts overwrite the first one's.
template <bool kRight>
void sum_kernel(const int* in,  // [kThreads]
                int* out) {     // [kThreads]
  MUSTDROP_SHARED_MEMORY(memory);
  int* parts = reinterpret_cast<int*>(memory);
  for (int turn = 0; turn < 2; ++turn) {
    const int mine = warp_sum(in[threadIdx.x] + turn);
    if (lane_id() == 0) parts[warp_id()] = mine;
    __syncthreads();
    int total = 0;
    for (unsigned w = 0; w < warps_in_block(); ++w) total += parts[w];
    out[threadIdx.x] += total;
    barrier<kRight>();
  }
}

// The neighbor's value within a warp; a shuffle does not order memory, __syncwarp does.
template <bool kRight>
void neighbor_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  held[threadIdx.x] = in[threadIdx.x];
  __shfl_xor_sync(kFullMask, 0, 1);
  if constexpr (kRight) __syncwarp();
  out[threadIdx.x] = held[threadIdx.x ^ 1];
}

template <bool kRight>
void store_outside_kernel(const int* in, int* out) {
  out[threadIdx.x + (kRight ? 0 : 1)] = in[threadIdx.x];
}

template <bool kRight>
void store_outside_shared_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  held[threadIdx.x + (kRight ? 0 : 1)] = in[threadIdx.x];
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kRight>
void load_outside_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x + (kRight ? 0 : kThreads)];
}

// Half of the block does not reach the barrier.
template <bool kRight>
void divergent_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (kRight || threadIdx.x < kThreads / 2) __syncthreads();
}

template <bool kRight>
void unwritten_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  if (kRight || threadIdx.x > 0) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}

// Lanes that have left the loop are still in the mask.
template <bool kRight>
void mask_kernel(const int* in, int* out) {
  const int rounds = kRight ? 2 : lane_id() < 16 ? 1 : 2;
  int value = in[threadIdx.x];
  for (int i = 0; i < rounds; ++i) value = __shfl_xor_sync(kFullMask, value, 1);
  out[threadIdx.x] = value;
}

template <bool kRight>
void copy_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  const unsigned at = threadIdx.x * 4;
  if (at < kThreads) copy16_async(held + at, in + at, true);
  copies_commit();
  if constexpr (kRight) copies_wait<0>();
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
  copies_wait<0>();
}

// A copy is started into a buffer that other threads may still be reading.
template <bool kRight>
void refill_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  const unsigned at = threadIdx.x * 4;
  int sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (at < kThreads) copy16_async(held + at, in + at, true);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    sum += held[kThreads - 1 - threadIdx.x];
    barrier<kRight>();
  }
  out[threadIdx.x] = sum;
}

template <bool kRight>
void blocks_kernel(const int* in, int* out) {
  if (kRight ? blockIdx.x == 0 : threadIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
}

template <bool kRight>
void count_kernel(const int*, int* out) {
  if constexpr (kRight)
    atomicAdd(&out[0], 1);
  else
    out[0] = out[0] + 1;
}

// The next block's value, through its shared memory. One of the cluster's barriers is missing.
template <bool kFirst, bool kMiddle, bool kLast>
void cluster_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  held[threadIdx.x] = 0;
  if constexpr (kFirst) cluster_barrier();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  cluster_shared(held, next)[threadIdx.x] = in[threadIdx.x] + static_cast<int>(next);
  if constexpr (kMiddle) cluster_barrier();
  out[threadIdx.x + blockIdx.x * kThreads] = held[threadIdx.x] + cluster_shared(held, next)[kThreads - 1 - threadIdx.x];
  if constexpr (kLast) cluster_barrier();
}

// The next block's value; a relaxed barrier orders the reads and not the writes.
template <bool kRight>
void relaxed_cluster_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int* held = reinterpret_cast<int*>(memory);
  for (int turn = 0; turn < 2; ++turn) {
    held[threadIdx.x] = in[threadIdx.x] + static_cast<int>(blockIdx.x) + turn;
    kRight ? cluster_barrier() : cluster_barrier_relaxed();
    const unsigned next = (cluster_rank() + 1) % cluster_size();
    out[threadIdx.x + blockIdx.x * kThreads] = cluster_shared(held, next)[kThreads - 1 - threadIdx.x];
    cluster_barrier_relaxed();
  }
}

// Adds to what the previous launch, of the same kernel, has written.
template <bool kRight>
void overlap_kernel(const int* in, int* out) {
  const int mine = in[threadIdx.x];
  if constexpr (kRight) wait_for_previous();
  out[threadIdx.x] += mine;
  wait_for_previous();
}
template <bool kRight>
void leave_kernel(const int* in, int* out) {
  if (!kRight && threadIdx.x == 0) return;
  wait_for_previous();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kRight>
void first_cluster_kernel(const int* in, int* out) {
  cluster_kernel<kRight, true, true>(in, out);
}
template <bool kRight>
void middle_cluster_kernel(const int* in, int* out) {
  cluster_kernel<true, kRight, true>(in, out);
}
template <bool kRight>
void last_cluster_kernel(const int* in, int* out) {
  cluster_kernel<true, true, kRight>(in, out);
}

// The second block overwrites elements that the first has read. Missing: the barrier before the flag, the wait, or the
// barrier after.
template <bool kRead, bool kWait, bool kSpread>
void handover_kernel(const int* in, int* out) {
  MUSTDROP_SHARED_MEMORY(memory);
  int *number = reinterpret_cast<int*>(memory), *counter = out + kThreads, *flag = counter + 1;
  if (threadIdx.x == 0) *number = atomicAdd(counter, 1);
  __syncthreads();
  if (*number == 0) {
    const int held = out[threadIdx.x];
    barrier<kRead>();
    if (threadIdx.x == 0) publish(flag);
    out[2 * kThreads + threadIdx.x] = held + in[threadIdx.x];
  } else if (*number == 1) {
    if (kWait && threadIdx.x == 0) wait_published(flag);
    barrier<kSpread>();
    out[threadIdx.x] = in[threadIdx.x];
  }
}

template <bool kRight>
void read_handover_kernel(const int* in, int* out) {
  handover_kernel<kRight, true, true>(in, out);
}
template <bool kRight>
void wait_handover_kernel(const int* in, int* out) {
  handover_kernel<true, kRight, true>(in, out);
}
template <bool kRight>
void spread_handover_kernel(const int* in, int* out) {
  handover_kernel<true, true, kRight>(in, out);
}

using Kernel = void (*)(const int*, int*);

struct Case {
  Kernel kernel;
  unsigned blocks = 1, cluster = 1;
  int overlapping = 0;  // launches, each of which may start before the previous one ends
};

#define MUSTDROP_CASE(NAME, ...)                                                \
  {                                                                             \
    #NAME, {                                                                    \
      {NAME##_kernel<false>, __VA_ARGS__}, { NAME##_kernel<true>, __VA_ARGS__ } \
    }                                                                           \
  }

const std::map<std::string, std::vector<Case>>& cases() {
  static const std::map<std::string, std::vector<Case>> all{
      MUSTDROP_CASE(reverse, 1, 1),
      MUSTDROP_CASE(sum, 1, 1),
      MUSTDROP_CASE(neighbor, 1, 1),
      MUSTDROP_CASE(store_outside, 1, 1),
      MUSTDROP_CASE(store_outside_shared, 1, 1),
      MUSTDROP_CASE(load_outside, 1, 1),
      MUSTDROP_CASE(divergent, 1, 1),
      MUSTDROP_CASE(unwritten, 1, 1),
      MUSTDROP_CASE(mask, 1, 1),
      MUSTDROP_CASE(copy, 1, 1),
      MUSTDROP_CASE(refill, 1, 1),
      MUSTDROP_CASE(blocks, 3, 1),
      MUSTDROP_CASE(count, 3, 1),
      MUSTDROP_CASE(first_cluster, 4, 4),
      MUSTDROP_CASE(middle_cluster, 4, 4),
      MUSTDROP_CASE(last_cluster, 4, 4),
      MUSTDROP_CASE(relaxed_cluster, 4, 4),
      MUSTDROP_CASE(overlap, 1, 1, 2),
      MUSTDROP_CASE(leave, 1, 1, 1),
      MUSTDROP_CASE(read_handover, 3, 1),
      MUSTDROP_CASE(wait_handover, 3, 1),
      MUSTDROP_CASE(spread_handover, 3, 1),
  };
  return all;
}

}  // namespace
}  // namespace mustdrop

// Runs a case. Returns null, and its kThreads * blocks numbers in `out`; or the emulation's error.
extern "C" __attribute__((visibility("default"))) const char* planted_run(const char* name, bool right, int* out) {
  static std::string said;
  const mustdrop::Case& c = mustdrop::cases().at(name).at(right);
  const std::vector<int> in = [] {
    std::vector<int> numbers(mustdrop::kThreads);
    std::iota(numbers.begin(), numbers.end(), 100);
    return numbers;
  }();
  std::vector<int> mine(mustdrop::kThreads * c.blocks, 0);  // of exactly this size, for the sanitizer
  try {
    const size_t shared_bytes = mustdrop::kThreads * sizeof(int);
    const dim3 grid(c.blocks), block(mustdrop::kThreads);
    for (int launch = 0; launch < std::max(c.overlapping, 1); ++launch)
      cuda_emulation::run({nullptr, grid, block, c.cluster, shared_bytes, c.overlapping > 0},
                          [&] { c.kernel(in.data(), mine.data()); });
  } catch (const std::runtime_error& error) {
    said = error.what();
    return said.c_str();
  }
  std::copy(mine.begin(), mine.end(), out);
  return nullptr;
}
