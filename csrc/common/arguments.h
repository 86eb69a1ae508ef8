// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's arguments: the conditions, their order and their words are those of mustdrop_kernels/checks.py.
#pragma once

#include <initializer_list>
#include <string>

#include "common/cpu.h"
#include "common/stable.h"

namespace mustdrop {

// What an argument is called; becomes text only where it is refused.
struct Argument {
  const char* name;
  int64_t entry = -1;  // of a list

  Argument(const char* name) : name(name) {}
  Argument(const char* name, int64_t entry) : name(name), entry(entry) {}
  std::string text() const { return entry < 0 ? name : name + ("[" + std::to_string(entry) + "]"); }
};

// A size that is known, or the name of one that is free.
struct Extent {
  int64_t size = -1;
  const char* name = nullptr;

  Extent(int64_t size) : size(size) {}
  Extent(const char* name) : name(name) {}
};

using Extents = std::initializer_list<Extent>;

inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
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
    case ScalarType::Bool:
      return "bool";
    default:
      return name_of(type);
  }
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void refuse_argument(const char* op, const Argument& argument,
                                                                  const Parts&... parts) {
  refuse(op, argument.text(), parts...);
}

[[noreturn]] __attribute__((noinline, cold)) inline void refuse_shape(const char* op, const Argument& argument,
                                                                      const Tensor& t, Extents shape) {
  std::string text;
  for (const Extent& extent : shape)
    text += (text.empty() ? "" : ", ") + (extent.name ? extent.name : std::to_string(extent.size));
  refuse(op, argument.text(), " must be (", text, "), got ", shape_of(t));
}

// Rank and known sizes.
inline void check_extents(const char* op, const Argument& argument, const Tensor& t, Extents shape) {
  const auto sizes = t.sizes();
  if (sizes.size() != shape.size()) refuse_shape(op, argument, t, shape);
  size_t d = 0;
  for (const Extent& extent : shape) {
    if (!extent.name && sizes[d] != extent.size) refuse_shape(op, argument, t, shape);
    ++d;
  }
}

inline void check_type(const char* op, const Argument& argument, const Tensor& t, ScalarType type) {
  const ScalarType got = t.scalar_type();
  if (got != type) refuse_argument(op, argument, " must be ", dtype_text(type), ", got ", dtype_text(got));
}

inline void check_computed(const char* op, const Argument& argument, const Tensor& t) {
  if (!is_float(t.scalar_type()))
    refuse_argument(op, argument, " must be float32 or float16 or bfloat16, got ", dtype_text(t.scalar_type()));
}

inline void check_place(const char* op, const Argument& argument, const Tensor& t, const Tensor& like) {
  if (!same_device(t, like)) refuse_argument(op, argument, " must be on ", device_text(like), ", got ", device_text(t));
}

inline void check_last_dense(const char* op, const Argument& argument, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1 && t.numel() != 0)
    refuse_argument(op, argument, " must be contiguous in its last dimension, got strides ", to_text(t.strides()));
}

// All of the above for a tensor of one element type.
inline void check_tensor(const char* op, const Argument& argument, const Tensor& t, Extents shape, ScalarType type,
                         const Tensor& like, bool any_strides = false) {
  check_extents(op, argument, t, shape);
  check_type(op, argument, t, type);
  check_place(op, argument, t, like);
  if (!any_strides) check_last_dense(op, argument, t);
}

inline void check_at_least(const char* op, const Argument& argument, int64_t value, int64_t least) {
  if (value < least) refuse_argument(op, argument, " must be at least ", least, ", got ", value);
}

// Past the largest number it stays there: more than any tensor has, so that a comparison with a tensor's size refuses it.
inline int64_t product(const std::vector<int64_t>& values) {
  int64_t result = 1;
  for (const int64_t value : values)
    if (__builtin_mul_overflow(result, value, &result)) return INT64_MAX;
  return result;
}

// The element type of a tensor that passed check_computed.
inline cpu::Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return cpu::Element::f16;
    case ScalarType::BFloat16:
      return cpu::Element::bf16;
    default:
      return cpu::Element::f32;
  }
}

}  // namespace mustdrop
