// SPDX-License-Identifier: Apache-2.0
// Element types, 16-byte accesses, warp and block reductions and scans of the CUDA kernels, and a wrapper for each PTX
// instruction that they use.
//
// No header of CUDA or torch: nvcc and NVRTC compile this text; a host compiler reads it for the launchers alone
// (MUSTDROP_LAUNCHERS_ONLY), or with the wrappers of tests/cuda_emulation/device_host.cuh (MUSTDROP_CUDA_EMULATED).
#pragma once

#if defined(__CUDACC_RTC__)
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
#else
#include <cstdint>
#endif

#if defined(MUSTDROP_LAUNCHERS_ONLY)
#include "common/host_names.h"
#endif

namespace mustdrop {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostCluster = 8;  // blocks of a cluster: the portable maximum
constexpr unsigned kFullMask = 0xffffffffu;

// ---------------------------------------------------------------------------------------------- element types

struct half_t {
  static constexpr bool kIsHalf = true;
  uint16_t bits;
};
struct bfloat16_t {
  static constexpr bool kIsHalf = false;
  uint16_t bits;
};

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float to_float(bfloat16_t v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float v);

template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

// N elements that one access reads or writes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  Pack<T, N> result;
  if constexpr (sizeof(result) == 16) {
    *reinterpret_cast<uint4*>(&result) = *reinterpret_cast<const uint4*>(from);
  } else {
    result = *reinterpret_cast<const Pack<T, N>*>(from);
  }
  return result;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& value) {
  if constexpr (sizeof(value) == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&value);
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = value;
  }
}

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x & (kWarp - 1); }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned warps_in_block() { return blockDim.x / kWarp; }

}  // namespace mustdrop

// ---------------------------------------------------------------------------------------------- PTX instructions

#if defined(MUSTDROP_CUDA_EMULATED)
#include "device_host.cuh"
#else

#define MUSTDROP_SHARED_MEMORY(name)      \
  extern __shared__ uint4 name##_bytes[]; \
  char* name = reinterpret_cast<char*>(name##_bytes)

namespace mustdrop {

__device__ __forceinline__ float to_float(half_t v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}

template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float v) {
  bfloat16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

template <>
__device__ __forceinline__ half_t from_float<half_t>(float v) {
  half_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

__device__ __forceinline__ float fast_exp2(float v) {  // within 2 ulp; subnormal results are 0
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// Rounded by itself, never fused with the sum that it is part of.
__device__ __forceinline__ float product(float a, float b) {
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {  // NaN if one of them is, as in torch.amax
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The address `pieces` times 16 bytes after `begin`, by one instruction.
__device__ __forceinline__ const void* piece_after(const void* begin, uint32_t pieces) {
  uint64_t result;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(result) : "r"(pieces), "l"(begin));
  return reinterpret_cast<const void*>(result);
}

// Starts a copy of 16 bytes from global to shared memory; writes zeros, and reads nothing, unless `valid`.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kLeft of this thread's committed groups are pending.
template <int kLeft>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Thread block clusters; below sm_90 each block is a cluster of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned result;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(result));
  return result;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned result;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(result));
  return result;
}
__device__ __forceinline__ void cluster_barrier() {  // orders shared memory of the whole cluster
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Publishes nothing: what a thread has read before may be overwritten after it, but writes are not ordered. It does not
// wait for loads in flight, so a thread must have used their results.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned rank) {  // the address of `mine` in block `rank`
  uint64_t result;
  asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(result);
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ void cluster_barrier_relaxed() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned) {
  return mine;
}
#endif

// Programmatic dependent launch (Grid::overlaps). A kernel that overlaps the end of the previous one must wait before it
// reads what that one has written, and before it exits.
__device__ __forceinline__ void launch_dependents() {  // the next kernel may start once all blocks have called this
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {  // until its writes are visible
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Sets a flag, initially 0, with release semantics: the accesses of this block before its last barrier are done. Called
// by one thread.
__device__ __forceinline__ void publish(int32_t* flag) {
  asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

// Waits with acquire semantics until another block has published; for the other threads of this block after the next
// barrier. The other block must be running: its ticket is lower than this block's.
__device__ __forceinline__ void wait_published(const int32_t* flag) {
  int32_t seen;
  do {
    asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen == 0);
}

// Loads four 8x8 matrices of 16-bit elements from shared memory (ldmatrix.x4): lane 8 m + r passes the address of row r
// (16 bytes) of matrix m; word m of a lane receives row lane / 4, columns 2 (lane % 4) and 2 (lane % 4) + 1 of matrix
// m.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const char* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// d += a b with a (16, 16), b (16, 8), d (16, 8) float32, fragments as in mma.sync.m16n8k16. With g = lane / 4 and
// t = lane % 4: a[0], a[2] hold columns (2t, 2t+1) and (2t+8, 2t+9) of row g, a[1], a[3] those of row g + 8; b[0], b[1]
// hold rows (2t, 2t+1) and (2t+8, 2t+9) of column g; d[0..1] columns 2t, 2t+1 of row g, d[2..3] those of row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define MUSTDROP_MMA(TYPE)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (T::kIsHalf) {
    MUSTDROP_MMA("f16");
  } else {
    MUSTDROP_MMA("bf16");
  }
#undef MUSTDROP_MMA
}

}  // namespace mustdrop

#endif

namespace mustdrop {

// ---------------------------------------------------------------------------------------------- arithmetic

__host__ __device__ __forceinline__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ __forceinline__ int64_t clamp_to(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

constexpr float kLog2E = 1.4426950408889634f;
__device__ __forceinline__ float infinity() { return bits_to_float(0x7f800000u); }

// Order-preserving map to integers: -0 equals +0, NaN is lowest. At least 2.
__device__ __forceinline__ uint32_t ordered_key(float v) {
  if (v != v) return 2;
  const uint32_t bits = float_to_bits(v + 0.0f);           // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // -inf gives 0x007fffff
}

// ---------------------------------------------------------------------------------------------- reductions and scans

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_xor_sync(kFullMask, v, delta);
  return v;
}

// Sum over the lanes up to and including this one.
template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T v) {
#pragma unroll
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const T below = __shfl_up_sync(kFullMask, v, delta);
    if (lane_id() >= delta) v += below;
  }
  return v;
}

// Sum over the block, deterministic and equal in all threads. `scratch`: one T per warp, reusable afterwards.
template <class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  v = warp_sum(v);
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  v = warp_sum(lane_id() < warps_in_block() ? scratch[lane_id()] : T(0));
  __syncthreads();
  return v;
}

// Sum over the threads before this one; `total` is the sum over the block. `scratch`: one T per warp, not to be reused
// before the next barrier.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T v, T* scratch, T& total) {
  const T inclusive = warp_inclusive_scan(v);
  if (lane_id() == kWarp - 1) scratch[warp_id()] = inclusive;
  __syncthreads();
  const T warp_total = lane_id() < warps_in_block() ? scratch[lane_id()] : T(0);
  const T warps = warp_inclusive_scan(warp_total);
  total = __shfl_sync(kFullMask, warps, kWarp - 1);
  return __shfl_sync(kFullMask, warps - warp_total, warp_id()) + inclusive - v;
}

}  // namespace mustdrop
