// SPDX-License-Identifier: Apache-2.0
// Argument checks that all operators share. Conditions, order and messages are those of mustdrop_kernels/ops.
#pragma once

#include <initializer_list>
#include <string>

#include "common/stable.h"

namespace mustdrop {

// The name of an argument, or of an entry of a list.
struct Argument {
  const char* name;
  int64_t entry = -1;  // -1: no list

  Argument(const char* name) : name(name) {}
  Argument(const char* name, int64_t entry) : name(name), entry(entry) {}
  std::string text() const { return entry < 0 ? name : name + ("[" + std::to_string(entry) + "]"); }
};

// One dimension of an expected shape: a required size, or the name of a free one.
struct Dimension {
  int64_t size = -1;
  const char* name = nullptr;

  Dimension(int64_t size) : size(size) {}
  Dimension(const char* name) : name(name) {}
};

using Shape = std::initializer_list<Dimension>;

// As Python writes a list: "[4, 6]".
inline std::string list_text(const std::vector<int64_t>& values) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  return "[" + text.str() + "]";
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void refuse_argument(const char* op, const Argument& argument,
                                                                  const Parts&... parts) {
  refuse(op, argument.text(), " ", parts...);
}

[[noreturn]] __attribute__((noinline, cold)) inline void refuse_shape(const char* op, const Argument& argument,
                                                                      const Tensor& t, Shape shape) {
  std::string text;
  for (const Dimension& dimension : shape)
    text += (text.empty() ? "" : ", ") + (dimension.name ? dimension.name : std::to_string(dimension.size));
  refuse_argument(op, argument, "must be (", text, "), got ", tuple_text(t.sizes()));
}

// Rank and required sizes.
inline void check_shape(const char* op, const Argument& argument, const Tensor& t, Shape shape) {
  const auto sizes = t.sizes();
  if (sizes.size() != shape.size()) refuse_shape(op, argument, t, shape);
  size_t d = 0;
  for (const Dimension& dimension : shape) {
    if (!dimension.name && sizes[d] != dimension.size) refuse_shape(op, argument, t, shape);
    ++d;
  }
}

inline void check_dtype(const char* op, const Argument& argument, const Tensor& t, ScalarType type) {
  const ScalarType got = t.scalar_type();
  if (got != type) refuse_argument(op, argument, "must be ", dtype_text(type), ", got ", dtype_text(got));
}

inline void check_float(const char* op, const Argument& argument, const Tensor& t) {
  const ScalarType got = t.scalar_type();
  if (got != ScalarType::Float && got != ScalarType::Half && got != ScalarType::BFloat16)
    refuse_argument(op, argument, "must be float32 or float16 or bfloat16, got ", dtype_text(got));
}

inline void check_device(const char* op, const Argument& argument, const Tensor& t, const Tensor& like) {
  if (t.is_cpu() != like.is_cpu() || t.get_device_index() != like.get_device_index())
    refuse_argument(op, argument, "must be on ", device_text(like), ", got ", device_text(t));
}

inline void check_last_contiguous(const char* op, const Argument& argument, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1 && t.numel() != 0)
    refuse_argument(op, argument, "must be contiguous in its last dimension, got strides ", tuple_text(t.strides()));
}

// Shape, dtype, device and, unless `any_strides`, the last dimension's stride.
inline void check_tensor(const char* op, const Argument& argument, const Tensor& t, Shape shape, ScalarType type,
                         const Tensor& like, bool any_strides = false) {
  check_shape(op, argument, t, shape);
  check_dtype(op, argument, t, type);
  check_device(op, argument, t, like);
  if (!any_strides) check_last_contiguous(op, argument, t);
}

// The first tensor of a call, which decides the device.
inline void check_float_tensor(const char* op, const Argument& argument, const Tensor& t, Shape shape) {
  check_shape(op, argument, t, shape);
  check_float(op, argument, t);
  check_last_contiguous(op, argument, t);
}

inline void check_at_least(const char* op, const Argument& argument, int64_t value, int64_t least) {
  if (value < least) refuse_argument(op, argument, "must be at least ", least, ", got ", value);
}

}  // namespace mustdrop
