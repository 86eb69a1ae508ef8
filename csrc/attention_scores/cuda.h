// SPDX-License-Identifier: Apache-2.0
// text_vision_scores on CUDA, for operators that fuse it.
#pragma once

#include "common/launch.h"

namespace mustdrop {

struct Scores {
  Tensor total, peak;  // [B, Lk]
};

// Launches on the device's current stream. The arguments have passed check_text_vision_scores.
Scores launch_text_vision_scores(const Device& device,
                                 const Tensor& q,            // [B, Hq, Lq, D]
                                 const Tensor& k,            // [B, Hk, Lk, D]
                                 const Tensor& token_types,  // [B, Lk]
                                 double scale,
                                 const OptionalTensor& lse);  // [B, Hq, Lq]

}  // namespace mustdrop
