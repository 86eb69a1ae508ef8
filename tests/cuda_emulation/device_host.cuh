// SPDX-License-Identifier: Apache-2.0
// Host twins of the PTX wrappers in csrc/common/device.cuh, which includes this file where the kernels are emulated.
#pragma once

#define MUSTDROP_SHARED_MEMORY(name) char* name = cuda_emulation::this_thread().shared

namespace mustdrop {

__device__ __forceinline__ float to_float(half_t v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);               // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));  // * 2^112
}

template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ __forceinline__ half_t from_float<half_t>(float v) {
  const uint32_t bits = float_to_bits(v), rest = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(0x7fff)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u) {                                                 // subnormal: the addition rounds at 2^-24
    const uint32_t low = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | low)};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13))};
}

__device__ __forceinline__ float fast_exp2(float v) {
  const float result = std::exp2(v);
  return result < bits_to_float(0x00800000u) ? 0.0f : result;
}

__device__ __forceinline__ float product(float a, float b) {
  const volatile float rounded = a * b;  // not fused
  return rounded;
}

__device__ __forceinline__ float max_nan(float a, float b) { return a != a || a > b ? a : b; }

__device__ __forceinline__ const void* piece_after(const void* begin, uint32_t pieces) {
  return static_cast<const char*>(begin) + uint64_t(pieces) * 16;
}

__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
  cuda_emulation::copy_later(shared, global, valid ? 16 : 0, 16);
}

__device__ __forceinline__ void copies_commit() { cuda_emulation::copies_commit(); }

template <int kLeft>
__device__ __forceinline__ void copies_wait() {
  cuda_emulation::copies_wait(kLeft);
}

__device__ __forceinline__ unsigned cluster_rank() { return cuda_emulation::this_thread().cluster_rank; }
__device__ __forceinline__ unsigned cluster_size() { return cuda_emulation::this_thread().cluster_size; }
__device__ __forceinline__ void cluster_barrier() {
  cuda_emulation::cluster_arrive();
  cuda_emulation::cluster_wait();
}
__device__ __forceinline__ void cluster_barrier_relaxed() {
  cuda_emulation::cluster_arrive(true);
  cuda_emulation::cluster_wait();
}
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(cuda_emulation::cluster_shared(mine, rank));
}

__device__ __forceinline__ void launch_dependents() {}

__device__ __forceinline__ void wait_for_previous() { cuda_emulation::wait_for_previous(); }

__device__ __forceinline__ void publish(int32_t* flag) { cuda_emulation::publish(flag); }

__device__ __forceinline__ void wait_published(const int32_t* flag) { cuda_emulation::wait_published(flag); }

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const char* row) {
  const auto rows = cuda_emulation::lanes("ldmatrix", kFullMask, row);
  for (unsigned m = 0; m < 4; ++m)
    words[m] = reinterpret_cast<const uint32_t*>(rows[8 * m + lane_id() / 4])[lane_id() % 4];
}

template <class T>
__device__ __forceinline__ void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
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
}

}  // namespace mustdrop
