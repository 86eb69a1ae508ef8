// SPDX-License-Identifier: Apache-2.0
// Calls an operator from C++ through torch's dispatcher: no Python, and no header of mustdrop_kernels.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <iostream>

using Merge = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor& x, c10::SymIntArrayRef grid,
                                                                         at::IntArrayRef window, double threshold,
                                                                         std::optional<c10::SymInt> budget,
                                                                         bool uniform, int64_t num_prefix_tokens,
                                                                         const std::optional<at::Tensor>& sizes,
                                                                         bool merged_first);

int main(int argc, char** argv) {
  if (argc != 2 || !dlopen(argv[1], RTLD_NOW)) {  // loading the library registers the operators
    std::cerr << "usage: merge /path/to/libmustdrop.so\n" << (argc == 2 ? dlerror() : "") << "\n";
    return 1;
  }
  const auto merge = c10::Dispatcher::singleton().findSchemaOrThrow("mustdrop::spatial_merge", "").typed<Merge>();

  const at::Tensor x = at::ones({1, 17, 8});  // CLS and 4 x 4 equal patches
  const c10::SymInt grid[] = {4, 4};
  const int64_t window[] = {2, 2};
  const auto [tokens, counts, assignment, sizes] = merge.call(x, grid, window, 0.8, std::nullopt, false, 1, {}, false);
  std::cout << "17 tokens became " << counts.item<int>() << "\n";
  return 0;
}
