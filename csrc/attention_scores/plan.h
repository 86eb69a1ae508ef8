// SPDX-License-Identifier: Apache-2.0
// Distribution of the attention scores over the multiprocessors of a device. One block occupies a multiprocessor.
#pragma once

#include <algorithm>

#include "common/device.cuh"

namespace mustdrop {

// log2 of the blocks that share the heads of a tile, at most `most`: minimizes the heads that a block processes one
// after the other, ceil(tiles / groups at once) ceil(heads / blocks of a group). Of equal ones the smallest, since each
// tile adds the search for its keys and the exchange of its sums. groups_at_once(bits): groups of 2^bits blocks that the
// device runs together; 0 if it runs none.
template <class GroupsAtOnce>
int32_t split_heads(int64_t tiles, int64_t heads, int64_t most, const GroupsAtOnce& groups_at_once) {
  int32_t best = 0;
  int64_t least = ceil_div(tiles, groups_at_once(0)) * heads;
  for (int32_t bits = 1; int64_t(1) << bits <= std::min(most, heads); ++bits) {
    const int64_t groups = groups_at_once(bits);
    const int64_t elapsed = groups > 0 ? ceil_div(tiles, groups) * ceil_div(heads, int64_t(1) << bits) : least;
    if (elapsed < least) best = bits, least = elapsed;
  }
  return best;
}

// Blocks that share the keys of a head in the normalizer, at most `most` and a power of two: minimizes
// ceil(heads splits / multiprocessors) ceil(tiles / splits), the key tiles that a multiprocessor processes.
inline int32_t split_keys(int64_t heads, int64_t tiles, int64_t multiprocessors, int64_t most) {
  const auto elapsed = [&](int64_t splits) {
    return ceil_div(heads * splits, multiprocessors) * ceil_div(tiles, splits);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= std::min(most, tiles); splits *= 2)
    if (elapsed(splits) < elapsed(best)) best = splits;
  return static_cast<int32_t>(best);
}

}  // namespace mustdrop
