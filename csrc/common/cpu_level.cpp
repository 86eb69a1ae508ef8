// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use on this machine.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "common/cpu.h"

namespace mustdrop::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // by Level

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
    throw std::runtime_error("MUSTDROP_CPU_CAPABILITY must be baseline, avx2, avx512 or avx512_bf16, got " + text);
  const Level asked = static_cast<Level>(found - std::begin(kNames));
  if (asked > best) throw std::runtime_error("MUSTDROP_CPU_CAPABILITY=" + text + ": this machine does not have it");
  return asked;
}

}  // namespace

Level level() {
  static const Level chosen = chosen_level();
  return chosen;
}

}  // namespace mustdrop::cpu

// For `mustdrop doctor`: the level's name, or why there is none.
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
