// SPDX-License-Identifier: Apache-2.0
// Argument checks of gather_tokens.
#pragma once

#include "common/checks.h"

namespace mustdrop {

inline void check_gather_tokens(const Tensor& x,         // [B, L, ...]
                                const Tensor& keep,      // [B, K]
                                const Tensor& counts) {  // [B]
  constexpr const char* op = "gather_tokens";
  if (x.dim() < 2) refuse_argument(op, "x", "must be (B, L, ...), got ", tuple_text(x.sizes()));
  if (x.dim() > 2) check_last_contiguous(op, "x", x);
  check_tensor(op, "keep", keep, {x.size(0), "K"}, ScalarType::Long, x);
  check_tensor(op, "counts", counts, {x.size(0)}, ScalarType::Int, x, true);
}

}  // namespace mustdrop
