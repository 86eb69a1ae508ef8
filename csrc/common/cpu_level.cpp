// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use on this machine.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/cpu.h"

namespace mustdrop::cpu {
namespace {

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Level::avx512;
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
  const Level asked = text == "avx512" ? Level::avx512 : text == "avx2" ? Level::avx2 : Level::baseline;
  if (text != "avx512" && text != "avx2" && text != "baseline")
    throw std::runtime_error("MUSTDROP_CPU_CAPABILITY must be baseline, avx2 or avx512, got " + text);
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
      const auto level = mustdrop::cpu::level();
      return std::string(level == mustdrop::cpu::Level::avx512 ? "avx512"
                         : level == mustdrop::cpu::Level::avx2 ? "avx2"
                                                               : "baseline");
    } catch (const std::exception& e) {
      return std::string(e.what());
    }
  }();
  return text.c_str();
}
