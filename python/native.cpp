// SPDX-License-Identifier: Apache-2.0
// mustdrop_kernels._native: what this build is. It only describes; no operator goes through it.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

py::tuple split(const std::string& text) {  // "80,90a" -> ("80", "90a")
  py::list parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');)
    if (!part.empty()) parts.append(part);
  return py::tuple(parts);
}

std::string target_abi() {  // 0x020a000000000000 -> "2.10"
  const unsigned long long abi = MUSTDROP_STABLE_ABI;
  return std::to_string(abi >> 56) + "." + std::to_string((abi >> 48) & 0xff);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about this build of mustdrop_kernels.";
  m.attr("version") = MUSTDROP_VERSION;
  m.attr("torch_target_version") = target_abi();
  m.attr("compiler") = MUSTDROP_COMPILER;
  m.attr("build_type") = MUSTDROP_BUILD_TYPE;
  m.attr("cpu_levels") = split(MUSTDROP_CPU_LEVELS);
  m.attr("cuda_compiler") = MUSTDROP_CUDA_COMPILER;
  m.attr("cuda_archs") = split(MUSTDROP_CUDA_ARCHS);
}
