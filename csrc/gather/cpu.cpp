// SPDX-License-Identifier: Apache-2.0
// gather_tokens on the CPU: out[b, i] = x[b, keep[b, i]] for i < counts[b], zero elsewhere.
#include <algorithm>
#include <cstring>

#include "common/stable.h"

namespace mustdrop {
namespace {

constexpr const char* kOp = "gather_tokens";
constexpr int64_t kGrainBytes = 64 << 10;  // least work of a thread

// One token of x: trailing dimensions, of which the last `run` bytes are contiguous.
struct Token {
  std::vector<int64_t> sizes;    // outer trailing dimensions
  std::vector<int64_t> strides;  // their strides in bytes
  int64_t run;                   // contiguous bytes at the end
  int64_t bytes;                 // of the whole token, packed
};

Token describe_token(const Tensor& x) {
  Token token{{}, {}, static_cast<int64_t>(x.element_size()), static_cast<int64_t>(x.element_size())};
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t stride = x.stride(d) * static_cast<int64_t>(x.element_size());
    if (token.sizes.empty() && (stride == token.run || x.size(d) == 1)) {
      token.run *= x.size(d);
    } else {
      token.sizes.insert(token.sizes.begin(), x.size(d));
      token.strides.insert(token.strides.begin(), stride);
    }
    token.bytes *= x.size(d);
  }
  return token;
}

void copy_token(const Token& token, size_t d, const char* from, char*& to) {
  if (d == token.sizes.size()) {
    std::memcpy(to, from, token.run);
    to += token.run;
    return;
  }
  for (int64_t i = 0; i < token.sizes[d]; ++i) copy_token(token, d + 1, from + i * token.strides[d], to);
}

Tensor gather_tokens(const Tensor& x,       // [B, L, ...]
                     const Tensor& keep,    // [B, K]
                     const Tensor& counts,  // [B]
                     bool align_end) {
  MUSTDROP_CHECK(x.dim() >= 2, kOp, "x", " must be (B, L, ...), got ", shape_of(x));
  if (x.dim() > 2) check_last_contiguous(kOp, "x", x);
  check_dim(kOp, "keep", keep, 2, "(B, K)");
  check_shape(kOp, "keep", keep, {x.size(0), keep.size(1)});
  check_dtype(kOp, "keep", keep, ScalarType::Long);
  check_last_contiguous(kOp, "keep", keep);
  check_shape(kOp, "counts", counts, {x.size(0)});
  check_dtype(kOp, "counts", counts, ScalarType::Int);
  check_device(kOp, "keep", keep, x);
  check_device(kOp, "counts", counts, x);

  const int64_t length = x.size(1), capacity = keep.size(1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = capacity;
  Tensor out = new_empty(x, shape, x.scalar_type());

  const Token token = describe_token(x);
  if (token.bytes == 0) return out;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* indices = static_cast<const int64_t*>(keep.const_data_ptr());
  const int32_t* kept = static_cast<const int32_t*>(counts.const_data_ptr());
  const int64_t element = x.element_size(), batch_stride = x.stride(0) * element, row_stride = x.stride(1) * element;
  const int64_t keep_stride = keep.stride(0), count_stride = counts.stride(0);

  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t b = slot / capacity;
      const int64_t n = std::clamp<int64_t>(kept[b * count_stride], 0, capacity);
      const int64_t entry = slot % capacity - (align_end ? capacity - n : 0);
      const int64_t index = entry >= 0 && entry < n ? indices[b * keep_stride + entry] : -1;
      char* target = to + slot * token.bytes;
      if (index < 0 || index >= length) {
        std::memset(target, 0, token.bytes);
      } else {
        copy_token(token, 0, from + b * batch_stride + index * row_stride, target);
      }
    }
  };
  torch::stable::parallel_for(0, x.size(0) * capacity, std::max<int64_t>(1, kGrainBytes / token.bytes), rows);
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(mustdrop, CPU, m) { m.impl("gather_tokens", TORCH_BOX(&mustdrop::gather_tokens)); }
