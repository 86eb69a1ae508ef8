// SPDX-License-Identifier: Apache-2.0
// Argument checks of spatial_merge.
#pragma once

#include "common/checks.h"

namespace mustdrop {

// INT64_MAX where the product is larger: more tokens than any tensor has.
inline int64_t saturating_product(const std::vector<int64_t>& values) {
  int64_t result = 1;
  for (const int64_t value : values)
    if (__builtin_mul_overflow(result, value, &result)) return INT64_MAX;
  return result;
}

inline void check_merge_budget(const char* op, const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                               int64_t budget, bool uniform) {
  if (uniform) refuse_argument(op, "uniform", "must not be set together with budget");
  int64_t windows = 1;
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    if (grid[axis] % window[axis] != 0)
      refuse_argument(op, "window", "must tile the grid ", list_text(grid), " where budget is set, got ",
                      list_text(window));
    windows *= grid[axis] / window[axis];
  }
  check_at_least(op, "budget", budget, 0);
  if (budget > windows)
    refuse_argument(op, "budget", "must be at most the number of windows, ", windows, ", got ", budget);
  if (budget > 0 && saturating_product(window) == 1)
    refuse_argument(op, "budget", "must be 0 with windows of one token, got ", budget);
}

inline void check_spatial_merge(const Tensor& x,  // [B, P+N, C]
                                const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                                const OptionalInt& budget, bool uniform, int64_t num_prefix_tokens,
                                const OptionalTensor& sizes) {  // [B, P+N]
  constexpr const char* op = "spatial_merge";
  check_float_tensor(op, "x", x, {"B", "P+N", "C"});
  if (grid.size() != 2 && grid.size() != 3)
    refuse_argument(op, "grid", "must be [H, W] or [T, H, W], got ", list_text(grid));
  if (window.size() != grid.size())
    refuse_argument(op, "window", "must have as many entries as grid, got ", list_text(window));
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    if (grid[axis] < 0) refuse_argument(op, "grid", "must not be negative, got ", list_text(grid));
    if (window[axis] < 1) refuse_argument(op, "window", "must be positive, got ", list_text(window));
  }
  check_at_least(op, "num_prefix_tokens", num_prefix_tokens, 0);
  const int64_t patches = saturating_product(grid);
  if (patches > x.size(1) || num_prefix_tokens != x.size(1) - patches)
    refuse_argument(op, "x", "must have num_prefix_tokens + prod(grid) tokens with num_prefix_tokens ",
                    num_prefix_tokens, " and grid ", list_text(grid), ", got ", x.size(1));
  if (sizes) check_tensor(op, "sizes", *sizes, {x.size(0), x.size(1)}, ScalarType::Float, x);
  if (budget) check_merge_budget(op, grid, window, *budget, uniform);
}

}  // namespace mustdrop
