// SPDX-License-Identifier: Apache-2.0
// The CPU kernels are compiled once per instruction set (levels) and chosen when they are called.
//
// A kernel file `cpu_kernel.cpp` is compiled several times, each time with MUSTDROP_CPU_LEVEL set to the name of a
// namespace: `baseline` (what the target architecture guarantees), and on x86-64 also `avx2` and `avx512`. Such a file
// - holds its code in namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL and nothing that the linker could share between levels:
//   no std:: containers or algorithms, no torch headers, only functions of its own (tests/packaging checks the symbols);
// - computes a range of independent work items; the threads are the business of the calling cpu.cpp.
#pragma once

#include <cstdint>

namespace mustdrop::cpu {

// avx512_bf16 is avx512 on a machine that also multiplies pairs of bfloat16, amx_bf16 on one that multiplies tiles of them:
// the same kernels, which may ask for it.
enum class Level { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

// The level in use: the best up to avx512_bf16 that this machine has, or the one that MUSTDROP_CPU_CAPABILITY names
// ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"; read once; a level that the machine lacks is refused by an
// exception at the first call). amx_bf16 has to be named, since it has only run on its plain twin.
Level level();

enum class Element : int32_t { f32, f16, bf16 };

}  // namespace mustdrop::cpu

// Declares the kernel's levels and mustdrop::cpu::NAME(args, begin, end), which calls the one in use.
#if defined(__x86_64__)
#define MUSTDROP_CPU_KERNEL(NAME, ARGS)                            \
  namespace mustdrop::cpu {                                        \
  namespace baseline {                                             \
  void NAME(const ARGS&, int64_t, int64_t);                        \
  }                                                                \
  namespace avx2 {                                                 \
  void NAME(const ARGS&, int64_t, int64_t);                        \
  }                                                                \
  namespace avx512 {                                               \
  void NAME(const ARGS&, int64_t, int64_t);                        \
  }                                                                \
  inline void NAME(const ARGS& args, int64_t begin, int64_t end) { \
    switch (level()) {                                             \
      case Level::amx_bf16:                                        \
      case Level::avx512_bf16:                                     \
      case Level::avx512:                                          \
        return avx512::NAME(args, begin, end);                     \
      case Level::avx2:                                            \
        return avx2::NAME(args, begin, end);                       \
      default:                                                     \
        return baseline::NAME(args, begin, end);                   \
    }                                                              \
  }                                                                \
  }
#else
#define MUSTDROP_CPU_KERNEL(NAME, ARGS)                                                                \
  namespace mustdrop::cpu {                                                                            \
  namespace baseline {                                                                                 \
  void NAME(const ARGS&, int64_t, int64_t);                                                            \
  }                                                                                                    \
  inline void NAME(const ARGS& args, int64_t begin, int64_t end) { baseline::NAME(args, begin, end); } \
  }
#endif
