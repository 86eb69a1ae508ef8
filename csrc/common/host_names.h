// SPDX-License-Identifier: Apache-2.0
// CUDA's names for a host compiler that needs only the parameters, sizes and names of kernels
// (MUSTDROP_LAUNCHERS_ONLY). Declarations without definitions: a call of a kernel would not link.
#pragma once

#include <cstdint>

#include "common/host_types.h"

#define __global__ inline
#define __shared__

extern const dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
template <class T>
T __shfl_sync(unsigned mask, T value, int from);
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits);
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta);
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta);
unsigned __ballot_sync(unsigned mask, int predicate);
int __any_sync(unsigned mask, int predicate);
int __all_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, unsigned value);
unsigned __reduce_add_sync(unsigned mask, unsigned value);
template <class T>
T atomicAdd(T* address, T value);
int __popc(unsigned value);
int __ffs(int value);
int __clz(int value);
float __uint_as_float(unsigned bits);
unsigned __float_as_uint(float value);
uint64_t __cvta_generic_to_shared(const void* pointer);
