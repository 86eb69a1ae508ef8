// SPDX-License-Identifier: Apache-2.0
// The element type of a tensor, as the CPU kernels take it.
#pragma once

#include "common/cpu.h"
#include "common/stable.h"

namespace mustdrop {

// Of a tensor that passed check_float.
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
