// SPDX-License-Identifier: Apache-2.0
// TokenType of mustdrop_kernels, for host and device code. No standard header: NVRTC has none.
#pragma once

namespace mustdrop {

constexpr unsigned char kPaddingToken = 0;
constexpr unsigned char kTextToken = 1;
constexpr unsigned char kVisionToken = 2;
constexpr unsigned char kQueryToken = 3;  // text whose attention decides which vision tokens matter

}  // namespace mustdrop
