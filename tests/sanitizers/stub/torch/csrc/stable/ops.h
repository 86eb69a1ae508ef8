// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

#include "torch/csrc/stable/tensor.h"

namespace torch::stable {

// Templates, so that a braced list does not match them.
template <class Shape>
Tensor new_empty(const Tensor&, const Shape& shape, Tensor::ScalarType type) {
  return {shape, type};
}

template <class Shape>
Tensor new_zeros(const Tensor&, const Shape& shape, Tensor::ScalarType type) {
  Tensor made(shape, type);
  std::memset(made.data<char>(), 0, static_cast<size_t>(made.numel()) * made.element_size());
  return made;
}

// Starts new threads in each call (threads.cpp).
uint32_t get_num_threads();
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

}  // namespace torch::stable
