// SPDX-License-Identifier: Apache-2.0
// Distribution of the attention scores over the multiprocessors of a device. One block occupies a multiprocessor.
#pragma once

#include <algorithm>

#include "common/device.cuh"

namespace mustdrop {

// log2 of the power of two, at most `most`, that minimizes elapsed(bits); of equal ones the smallest.
template <class Elapsed>
int32_t best_split(int64_t most, const Elapsed& elapsed) {
  int32_t best = 0;
  for (int32_t bits = 1; int64_t(1) << bits <= most; ++bits)
    if (elapsed(bits) < elapsed(best)) best = bits;
  return best;
}

// log2 of the blocks that share the heads of a tile, at most `most`: minimizes the heads that a block processes one
// after the other, ceil(tiles / groups at once) ceil(heads / blocks of a group). A smaller split is preferred, since each
// tile adds the search for its keys and the exchange of its sums. groups_at_once(bits): groups of 2^bits blocks that the
// device runs together; 0 if it runs none.
template <class GroupsAtOnce>
int32_t split_heads(int64_t tiles, int64_t heads, int64_t most, const GroupsAtOnce& groups_at_once) {
  return best_split(std::min(most, heads), [&](int32_t bits) {
    const int64_t groups = groups_at_once(bits);
    return groups > 0 ? ceil_div(tiles, groups) * ceil_div(heads, int64_t(1) << bits) : INT64_MAX;
  });
}

// log2 of the blocks that share the keys of a head in the normalizer, at most `most`: minimizes
// ceil(heads blocks / multiprocessors) ceil(tiles / blocks), the key tiles that a multiprocessor processes.
inline int32_t split_keys(int64_t heads, int64_t tiles, int64_t multiprocessors, int64_t most) {
  return best_split(std::min(most, tiles), [&](int32_t bits) {
    return ceil_div(heads << bits, multiprocessors) * ceil_div(tiles, int64_t(1) << bits);
  });
}

}  // namespace mustdrop
