// SPDX-License-Identifier: Apache-2.0
// Registration: the operators' functions by name; callers cast them to their types.
#pragma once

#include <any>
#include <map>
#include <string>

#include "torch/csrc/stable/tensor.h"

namespace torch::stable {

inline std::map<std::string, std::any>& registered() {
  static std::map<std::string, std::any> functions;
  return functions;
}

struct Module {
  template <class Function>
  void impl(const char* name, Function function) {
    registered()[name] = function;
  }
};

}  // namespace torch::stable

#define TORCH_BOX(function) function
#define STABLE_TORCH_LIBRARY_IMPL(library, key, module)                                    \
  static void register_operators(torch::stable::Module module);                            \
  static const bool registered_here = (register_operators(torch::stable::Module{}), true); \
  static void register_operators(torch::stable::Module module)
