// SPDX-License-Identifier: Apache-2.0
// The scores on the CPU, for operators that need them as a step of their own.
#pragma once

#include "common/stable.h"

namespace mustdrop {

// total and peak, [B, Lk] float32 each. Checks its arguments, in the name of operator `op`.
std::tuple<Tensor, Tensor> text_vision_scores(const char* op,
                                              const Tensor& q,            // [B, Hq, Lq, D]
                                              const Tensor& k,            // [B, Hk, Lk, D]
                                              const Tensor& token_types,  // [B, Lk]
                                              double scale,
                                              const OptionalTensor& lse  // [B, Hq, Lq]
);

}  // namespace mustdrop
