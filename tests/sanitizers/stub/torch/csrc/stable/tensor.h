// SPDX-License-Identifier: Apache-2.0
// The part of torch's stable ABI that csrc/*/cpu*.cpp uses, in plain C++, so that a sanitizer instruments the whole
// process.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

namespace torch::headeronly {
using IntHeaderOnlyArrayRef = HeaderOnlyArrayRef<int64_t>;
}

namespace torch::stable {

class Tensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;

  Tensor() = default;
  Tensor(std::vector<int64_t> sizes, ScalarType type)
      : sizes_(std::move(sizes)), strides_(sizes_.size()), type_(type), bytes_(element_bytes(type)) {
    int64_t step = 1;
    for (size_t d = sizes_.size(); d-- > 0; step *= sizes_[d]) strides_[d] = step;
    memory_ = std::shared_ptr<char[]>(new char[static_cast<size_t>(numel()) * bytes_ + 1]);
    data_ = memory_.get();
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_.at(static_cast<size_t>(d)); }
  int64_t stride(int64_t d) const { return strides_.at(static_cast<size_t>(d)); }
  torch::headeronly::IntHeaderOnlyArrayRef sizes() const { return {sizes_.data(), sizes_.size()}; }
  torch::headeronly::IntHeaderOnlyArrayRef strides() const { return {strides_.data(), strides_.size()}; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes_) n *= size;
    return n;
  }
  size_t element_size() const { return bytes_; }
  ScalarType scalar_type() const { return type_; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int32_t get_device_index() const { return -1; }

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  // Swaps dimensions a and b.
  Tensor transpose(size_t a, size_t b) const {
    Tensor other = *this;
    std::swap(other.sizes_[a], other.sizes_[b]), std::swap(other.strides_[a], other.strides_[b]);
    return other;
  }
  Tensor clone() const {
    Tensor other(sizes_, type_);
    std::memcpy(other.data_, data_, static_cast<size_t>(numel()) * bytes_);
    other.strides_ = strides_;
    return other;
  }

 private:
  static size_t element_bytes(ScalarType type) {
    switch (type) {
      case ScalarType::Byte:
      case ScalarType::Bool:
        return 1;
      case ScalarType::Half:
      case ScalarType::BFloat16:
        return 2;
      case ScalarType::Float:
      case ScalarType::Int:
        return 4;
      case ScalarType::Long:
        return 8;
      default:
        throw std::runtime_error("the stub has no such element type");
    }
  }

  std::vector<int64_t> sizes_, strides_;
  ScalarType type_ = ScalarType::Float;
  size_t bytes_ = 4;
  std::shared_ptr<char[]> memory_;
  char* data_ = nullptr;
};

}  // namespace torch::stable
