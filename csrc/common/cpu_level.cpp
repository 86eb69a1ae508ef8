// SPDX-License-Identifier: Apache-2.0
// Selects the level of the CPU kernels on this machine.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "common/cpu.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mustdrop::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};  // by Level

// Whether the machine has AMX tiles and AMX-BF16, and the operating system lets this process use them.
bool has_amx() {
#if defined(MUSTDROP_AMX_PLAIN)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;       // of leaf 7's edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; the tile state
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best level that is chosen by default.
Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Level::avx512_bf16 : Level::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Level::avx2;
#endif
  return Level::baseline;
}

Level chosen_level() {
  const Level best = best_level();
  const char* name = std::getenv("MUSTDROP_CPU_CAPABILITY");
  if (!name || !*name) return best;
  const std::string text = name;
  const auto found = std::find(std::begin(kNames), std::end(kNames), text);
  if (found == std::end(kNames))
    throw std::runtime_error("MUSTDROP_CPU_CAPABILITY must be baseline, avx2, avx512, avx512_bf16 or amx_bf16, got " +
                             text);
  const Level requested = static_cast<Level>(found - std::begin(kNames));
  if (requested == Level::amx_bf16 ? best < Level::avx512_bf16 || !has_amx() : requested > best)
    throw std::runtime_error("MUSTDROP_CPU_CAPABILITY=" + text + ": this machine does not have it");
  return requested;
}

}  // namespace

Level level() {
  static const Level chosen = chosen_level();
  return chosen;
}

}  // namespace mustdrop::cpu

// For `mustdrop doctor`: the level's name, or the error.
extern "C" __attribute__((visibility("default"))) const char* mustdrop_cpu_capability() {
  static const std::string text = [] {
    try {
      return std::string(mustdrop::cpu::kNames[static_cast<int>(mustdrop::cpu::level())]);
    } catch (const std::exception& e) {
      return std::string(e.what());
    }
  }();
  return text.c_str();
}
