// SPDX-License-Identifier: Apache-2.0
// Everything that the operators' host code uses of torch, by way of its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// The operators' namespace, and the dispatch key of the CUDA launchers; other builds of the same files set their own.
#ifndef MUSTDROP_NAMESPACE
#define MUSTDROP_NAMESPACE mustdrop
#endif
#ifndef MUSTDROP_DEVICE_KEY
#define MUSTDROP_DEVICE_KEY CUDA
#endif

namespace mustdrop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// Raises a RuntimeError in Python.
template <class... Parts>
[[noreturn]] void refuse(const char* op, const std::string& argument, const Parts&... parts) {
  std::ostringstream text;
  text << "mustdrop::" << op << ": " << argument;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// As Python writes a tuple: "(2, 14)", "(14,)".
inline std::string tuple_text(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

// As torch writes a dtype, without its prefix: "float32".
inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {  // Bool, BFloat16, UInt16, Float8_e4m3fn, ...
      std::string name = torch::headeronly::toString(type);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return name;
    }
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A new tensor on the device of `like`. Without memory for it, the error names its shape and dtype.
template <class Make>
Tensor allocate(const Make& make, const std::vector<int64_t>& shape, ScalarType type) {
  try {
    return make();
  } catch (const std::exception&) {
    throw std::runtime_error("mustdrop: no memory for a result of shape " + tuple_text(shape) + ", " +
                             dtype_text(type));
  }
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {  // not zeroed
  return allocate([&] { return torch::stable::new_empty(like, shape, type); }, shape, type);
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return allocate([&] { return torch::stable::new_zeros(like, shape, type); }, shape, type);
}

}  // namespace mustdrop
