// SPDX-License-Identifier: Apache-2.0
// Levels: the CPU kernels are compiled once per instruction set; calls dispatch at run time.
//
// A file `cpu_kernel*.cpp` is compiled once per level, with MUSTDROP_CPU_LEVEL set to the name of a namespace:
// `baseline` (the instructions that the architecture guarantees), and on x86-64 also `avx2` and `avx512`. Such a file
// - holds its code in namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL and nothing that the linker could share between
//   levels: no std:: containers or algorithms, no torch headers (tests/packaging checks the symbols);
// - computes a range of independent work items; cpu.cpp distributes them to threads.
#pragma once

#include <cstdint>

namespace mustdrop::cpu {

// avx512_bf16 and amx_bf16 run the kernels of avx512, which then may multiply pairs, or tiles, of bfloat16.
enum class Level { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

// The level in use: the best of this machine up to avx512_bf16, or the value of MUSTDROP_CPU_CAPABILITY ("baseline",
// "avx2", "avx512", "avx512_bf16", "amx_bf16"), read once. Throws at the first call if the machine lacks that level.
// amx_bf16 is never the default: it has only been tested in plain C++ (cpu_amx.h).
Level level();

enum class Element : int32_t { f32, f16, bf16 };

}  // namespace mustdrop::cpu

// Declares a kernel at each level, and mustdrop::cpu::NAME(args, begin, end), which calls the level in use.
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
