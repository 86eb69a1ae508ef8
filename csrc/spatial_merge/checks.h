// SPDX-License-Identifier: Apache-2.0
// What spatial_merge asks of its arguments.
#pragma once

#include "common/arguments.h"

namespace mustdrop {

inline void check_spatial_merge(const Tensor& x,  // [B, P+N, C]
                                const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                                const OptionalInt& budget, bool uniform, int64_t num_prefix_tokens,
                                const OptionalTensor& sizes) {  // [B, P+N]
  constexpr const char* op = "spatial_merge";
  check_dim(op, "x", x, 3, "(B, P+N, C)");
  check_float(op, "x", x);
  check_last_contiguous(op, "x", x);
  MUSTDROP_CHECK(grid.size() == 2 || grid.size() == 3, op, "grid", " must be [H, W] or [T, H, W], got ", to_text(grid));
  MUSTDROP_CHECK(window.size() == grid.size(), op, "window", " must have as many entries as grid, got ",
                 to_text(window));
  int64_t windows = 1;
  for (size_t d = 0; d < grid.size(); ++d) {
    MUSTDROP_CHECK(grid[d] >= 0, op, "grid", " must not be negative, got ", to_text(grid));
    MUSTDROP_CHECK(window[d] >= 1, op, "window", " must be positive, got ", to_text(window));
    windows = product({windows, grid[d] / window[d]});
  }
  const int64_t patches = product(grid), tokens = product(window);
  MUSTDROP_CHECK(num_prefix_tokens >= 0, op, "num_prefix_tokens", " must be at least 0, got ", num_prefix_tokens);
  MUSTDROP_CHECK(patches <= x.size(1) && num_prefix_tokens == x.size(1) - patches, op, "x",
                 " must have num_prefix_tokens + prod(grid) = ", num_prefix_tokens, " + ", patches, " tokens, got ",
                 x.size(1));
  if (sizes) {
    check_shape(op, "sizes", *sizes, {x.size(0), x.size(1)});
    check_dtype(op, "sizes", *sizes, ScalarType::Float);
    check_device(op, "sizes", *sizes, x);
    check_last_contiguous(op, "sizes", *sizes);
  }
  if (!budget) return;
  MUSTDROP_CHECK(!uniform, op, "uniform", " must not be set together with budget");
  for (size_t d = 0; d < grid.size(); ++d)
    MUSTDROP_CHECK(grid[d] % window[d] == 0, op, "window", " must tile the grid ", to_text(grid),
                   " where budget is set, got ", to_text(window));
  MUSTDROP_CHECK(*budget >= 0, op, "budget", " must not be negative, got ", *budget);
  MUSTDROP_CHECK(*budget <= windows, op, "budget", " must be at most the number of windows, ", windows, ", got ",
                 *budget);
  MUSTDROP_CHECK(tokens > 1 || *budget == 0, op, "budget", " must be 0 with windows of one token, got ", *budget);
}

}  // namespace mustdrop
