// SPDX-License-Identifier: Apache-2.0
// What gather_tokens asks of its arguments.
#pragma once

#include "common/stable.h"

namespace mustdrop {

inline void check_gather_tokens(const Tensor& x,         // [B, L, ...]
                                const Tensor& keep,      // [B, K]
                                const Tensor& counts) {  // [B]
  constexpr const char* op = "gather_tokens";
  MUSTDROP_CHECK(x.dim() >= 2, op, "x", " must be (B, L, ...), got ", shape_of(x));
  if (x.dim() > 2) check_last_contiguous(op, "x", x);
  check_dim(op, "keep", keep, 2, "(B, K)");
  check_shape(op, "keep", keep, {x.size(0), keep.size(1)});
  check_dtype(op, "keep", keep, ScalarType::Long);
  check_last_contiguous(op, "keep", keep);
  check_shape(op, "counts", counts, {x.size(0)});
  check_dtype(op, "counts", counts, ScalarType::Int);
  check_device(op, "keep", keep, x);
  check_device(op, "counts", counts, x);
}

}  // namespace mustdrop
