// SPDX-License-Identifier: Apache-2.0
// The one door to torch's stable ABI: everything that an operator's host code needs of torch, and nothing else.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// Where operators are defined, and which tensors the CUDA launchers take: other builds of the same files have their own.
#ifndef MUSTDROP_NAMESPACE
#define MUSTDROP_NAMESPACE mustdrop
#endif
#ifndef MUSTDROP_DEVICE_KEY
#define MUSTDROP_DEVICE_KEY CUDA
#endif

namespace mustdrop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// Refuses an argument. Reads as: MUSTDROP_CHECK(ok, op, "scores", " must be (B, L), got ", shape_of(scores)).
#define MUSTDROP_CHECK(ok, op, argument, ...)                 \
  do {                                                        \
    if (!(ok)) ::mustdrop::refuse(op, argument, __VA_ARGS__); \
  } while (false)

template <class... Parts>
[[noreturn]] void refuse(const char* op, const std::string& argument, const Parts&... parts) {
  std::ostringstream text;
  text << "mustdrop::" << op << ": " << argument;
  (text << ... << parts);
  throw std::runtime_error(text.str());  // a RuntimeError in Python
}

inline std::string to_text(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ")";
  return text.str();
}

inline std::string shape_of(const Tensor& t) { return to_text(t.sizes()); }

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

inline bool is_float(ScalarType type) {  // the element types that are computed with
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_float(const char* op, const std::string& argument, const Tensor& t) {
  MUSTDROP_CHECK(is_float(t.scalar_type()), op, argument, " must be float32, float16 or bfloat16, got ",
                 name_of(t.scalar_type()));
}

inline void check_dtype(const char* op, const std::string& argument, const Tensor& t, ScalarType type) {
  MUSTDROP_CHECK(t.scalar_type() == type, op, argument, " must be ", name_of(type), ", got ", name_of(t.scalar_type()));
}

inline void check_dim(const char* op, const std::string& argument, const Tensor& t, int64_t dim, const char* shape) {
  MUSTDROP_CHECK(t.dim() == dim, op, argument, " must be ", shape, ", got ", shape_of(t));
}

inline void check_shape(const char* op, const std::string& argument, const Tensor& t, std::vector<int64_t> shape) {
  const bool same =
      t.dim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), t.sizes().begin());
  MUSTDROP_CHECK(same, op, argument, " must be ", to_text(shape), ", got ", shape_of(t));
}

inline void check_device(const char* op, const std::string& argument, const Tensor& t, const Tensor& like) {
  MUSTDROP_CHECK(same_device(t, like), op, argument, " must be on the device of the first tensor");
}

inline void check_last_contiguous(const char* op, const std::string& argument, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  MUSTDROP_CHECK(last < 0 || t.size(last) <= 1 || t.stride(last) == 1 || t.numel() == 0, op, argument,
                 " must be contiguous in its last dimension, got strides ", to_text(t.strides()));
}

// A new tensor on the device of `like`. Where there is no memory for it, the error says for what; torch has said why.
template <class Make>
Tensor allocate(const Make& make, const std::vector<int64_t>& shape, ScalarType type) {
  try {
    return make();
  } catch (const std::exception&) {
    throw std::runtime_error("mustdrop: no memory for a result of shape " + to_text(shape) + ", " + name_of(type));
  }
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {  // not zeroed
  return allocate([&] { return torch::stable::new_empty(like, shape, type); }, shape, type);
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return allocate([&] { return torch::stable::new_zeros(like, shape, type); }, shape, type);
}

}  // namespace mustdrop
