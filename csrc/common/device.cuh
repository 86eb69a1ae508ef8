// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels share: element types, 16-byte accesses, warp and block reductions and scans, and one thin wrapper
// each for matrix, asynchronous copy and cluster instructions.
//
// No header of CUDA or torch: nvcc, NVRTC and the host emulation of the tests (MUSTDROP_CUDA_EMULATED) compile the same
// text, and a host compiler reads it for the launchers alone (MUSTDROP_LAUNCHERS_ONLY). Every wrapper of an instruction has a plain C++ twin for the host.
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

#if defined(MUSTDROP_CUDA_EMULATED)
#define MUSTDROP_SHARED_MEMORY(name) char* name = cuda_emulation::here().shared
#else
#define MUSTDROP_SHARED_MEMORY(name)      \
  extern __shared__ uint4 name##_bytes[]; \
  char* name = reinterpret_cast<char*>(name##_bytes)
#endif

namespace mustdrop {

constexpr unsigned kWarp = 32;
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

__device__ __forceinline__ float to_float(half_t v) {
#if defined(MUSTDROP_CUDA_EMULATED)
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);               // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));  // * 2^112
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float v);

template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float v) {
#if defined(MUSTDROP_CUDA_EMULATED)
  const uint32_t bits = float_to_bits(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#else
  bfloat16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
#endif
}

template <>
__device__ __forceinline__ half_t from_float<half_t>(float v) {
#if defined(MUSTDROP_CUDA_EMULATED)
  const uint32_t bits = float_to_bits(v), rest = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(0x7fff)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u) {                                                 // subnormal: the addition rounds at 2^-24
    const uint32_t low = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | low)};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13))};
#else
  half_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
#endif
}

// N elements that are read and written by one access.
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

// ---------------------------------------------------------------------------------------------- arithmetic

__host__ __device__ __forceinline__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ __forceinline__ int64_t clamp_to(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float infinity() { return bits_to_float(0x7f800000u); }

__device__ __forceinline__ float fast_exp2(float v) {  // within 2 units in the last place; subnormal results are 0
#if defined(MUSTDROP_CUDA_EMULATED)
  const float result = std::exp2(v);
  return result < bits_to_float(0x00800000u) ? 0.0f : result;
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}

__device__ __forceinline__ float max_nan(float a, float b) {  // NaN if one of them is, as torch.amax has it
#if defined(MUSTDROP_CUDA_EMULATED)
  return a != a || a > b ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// Ordered as the values are: -0 equals +0, NaN is lowest. Never below 2.
__device__ __forceinline__ uint32_t ordered_key(float v) {
  if (v != v) return 2;
  const uint32_t bits = float_to_bits(v + 0.0f);           // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // -inf gives 0x007fffff
}

// ---------------------------------------------------------------------------------------------- threads

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x & (kWarp - 1); }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned warps_in_block() { return blockDim.x / kWarp; }

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_xor_sync(kFullMask, v, delta);
  return v;
}

// The sum over the lanes up to and including this one.
template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T v) {
#pragma unroll
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const T below = __shfl_up_sync(kFullMask, v, delta);
    if (lane_id() >= delta) v += below;
  }
  return v;
}

// The sum over the block, the same bits in every thread and every run. `scratch`: one T per warp, free again afterwards.
template <class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  v = warp_sum(v);
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  v = warp_sum(lane_id() < warps_in_block() ? scratch[lane_id()] : T(0));
  __syncthreads();
  return v;
}

// The maximum over the block, NaN where one is NaN. `scratch`: one float per warp, free again afterwards.
__device__ __forceinline__ float block_max_nan(float v, float* scratch) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) v = max_nan(v, __shfl_xor_sync(kFullMask, v, delta));
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  for (unsigned w = 0; w < warps_in_block(); ++w) v = max_nan(v, scratch[w]);
  __syncthreads();
  return v;
}

// The sum over the threads before this one; `total` is the sum over the block. `scratch`: one T per warp, which the caller
// leaves alone until the next barrier.
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

// ---------------------------------------------------------------------------------------------- asynchronous copies

// Starts a copy of 16 bytes from global into shared memory; zeros where it is not `valid` (then nothing is read).
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
#if defined(MUSTDROP_CUDA_EMULATED)
  cuda_emulation::copy_later(shared, global, valid ? 16 : 0, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

__device__ __forceinline__ void copies_commit() {
#if defined(MUSTDROP_CUDA_EMULATED)
  cuda_emulation::copies_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kLeft of this thread's committed groups are under way.
template <int kLeft>
__device__ __forceinline__ void copies_wait() {
#if defined(MUSTDROP_CUDA_EMULATED)
  cuda_emulation::copies_wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------- clusters

// Blocks of a cluster, with the sm_90 instructions; below that every block is alone.
#if defined(MUSTDROP_CUDA_EMULATED)
__device__ __forceinline__ unsigned cluster_rank() { return cuda_emulation::here().cluster_rank; }
__device__ __forceinline__ unsigned cluster_size() { return cuda_emulation::here().cluster_size; }
__device__ __forceinline__ void cluster_barrier() {
  cuda_emulation::cluster_arrive();
  cuda_emulation::cluster_wait();
}
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(cuda_emulation::cluster_shared(mine, rank));
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
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
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned rank) {  // what is at `mine` here, in block `rank`
  uint64_t result;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(result);
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned) {
  return mine;
}
#endif

// ---------------------------------------------------------------------------------------------- between blocks

// One thread says through a flag, 0 before, that what its block has read and written before the last barrier is done.
__device__ __forceinline__ void publish(int32_t* flag) {
#if defined(MUSTDROP_CUDA_EMULATED)
  cuda_emulation::publish(flag);
#else
  asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
#endif
}

// Waits until another block has published; the next barrier makes it so for this thread's block. That block has to be
// running: it has taken a ticket before this one did.
__device__ __forceinline__ void wait_published(const int32_t* flag) {
#if defined(MUSTDROP_CUDA_EMULATED)
  cuda_emulation::wait_published(flag);
#else
  int32_t seen;
  do {
    asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen == 0);
#endif
}

// ---------------------------------------------------------------------------------------------- matrix

// Four 8x8 matrices of 16-bit elements from shared memory, spread over a warp as ldmatrix.x4 has it: lane 8 m + r names row
// r of matrix m (16 bytes), and word m of a lane is what stands in row lane / 4 of it, columns 2 (lane % 4) and one more.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const char* row) {
#if defined(MUSTDROP_CUDA_EMULATED)
  const auto rows = cuda_emulation::lanes("ldmatrix", kFullMask, row);
  for (unsigned m = 0; m < 4; ++m)
    words[m] = reinterpret_cast<const uint32_t*>(rows[8 * m + lane_id() / 4])[lane_id() % 4];
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
#endif
}

// d += a b, a (16, 16), b (16, 8), d (16, 8) float32, spread over a warp as mma.sync.m16n8k16 has it. With g = lane / 4 and
// t = lane % 4: a[0], a[2] hold columns (2t, 2t+1) and (2t+8, 2t+9) of row g, a[1], a[3] those of row g + 8; b[0], b[1] rows
// (2t, 2t+1) and (2t+8, 2t+9) of column g; d[0..1] columns 2t, 2t+1 of row g, d[2..3] those of row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(MUSTDROP_CUDA_EMULATED)
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = cuda_emulation::lanes("mma", kFullMask, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const auto part = [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> (16 * i))}); };
  const unsigned g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) {
      const Operands& row = all[g * 4 + k % 8 / 2];
      const Operands& column = all[(2 * t + i % 2) * 4 + k % 8 / 2];
      d[i] += part(row.a[i / 2 + k / 8 * 2], k % 2) * part(column.b[k / 8], k % 2);
    }
#else
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
#endif
}

}  // namespace mustdrop
