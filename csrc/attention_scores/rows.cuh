// SPDX-License-Identifier: Apache-2.0
// Finds the query rows of a sequence, a tile at a time. Their number is on the device only, so every block searches.
//
// A thread reads 64 consecutive positions with four loads of 16 bytes and keeps a bit for each; a scan over the block
// counts them, and each warp writes the positions that its lanes have found, one lane's after the other's.
#pragma once

#include "attention_scores/layout.cuh"

namespace mustdrop {

constexpr int kTileRows = 128;                // query rows of a tile
constexpr int kScoreThreads = 256;            // of every block but those of cls.cuh
constexpr int kScanned = 64;                  // positions of a thread
constexpr int kScannedWords = kScanned / 32;  // of a bit for each
constexpr int kScoreWarps = kScoreThreads / static_cast<int>(kWarp);

// A block's query rows, in shared memory.
struct RowTile {
  int32_t position[kTileRows];              // -1 past the rows
  int32_t next;                             // the first one past them
  alignas(16) uint32_t found[kScoreWarps];  // by each warp
};

// Bit i is set if byte i of `word` is kQueryToken.
__device__ __forceinline__ uint32_t query_bits(uint32_t word) {
  const uint32_t other = word ^ (kQueryToken * 0x01010101u);  // zero bytes are queries
  const uint32_t zero = ~(((other & 0x7f7f7f7fu) + 0x7f7f7f7fu) | other | 0x7f7f7f7fu);
  return ((zero >> 7) * 0x01020408u) >> 24 & 0xfu;
}

// Bits of the queries in [begin, end) among the kScanned positions of this thread; the address of `start`, the position
// of the first thread, is a multiple of 16. Called by whole warps.
__device__ __forceinline__ void query_mask(const uint8_t* types, int64_t start, int32_t begin, int32_t end,
                                           uint32_t (&mask)[kScannedWords]) {
  const int64_t first = start + int64_t(threadIdx.x) * kScanned;
  uint4 words[kScanned / 16];  // loads in flight together
#pragma unroll
  for (int i = 0; i < kScanned / 16; ++i) {
    const bool inside = first + 16 * i >= begin && first + 16 * (i + 1) <= end;
    words[i] = inside ? *reinterpret_cast<const uint4*>(types + first + 16 * i) : uint4{~0u, ~0u, ~0u, ~0u};
  }
  // The first 16 and the last, which may be partly outside.
  const int64_t edges[2] = {start, end - 1 - static_cast<int64_t>(reinterpret_cast<uint64_t>(types + end - 1) % 16)};
  bool query[2];
#pragma unroll
  for (int edge = 0; edge < 2; ++edge) {
    const int64_t position = edges[edge] + lane_id() % 16;
    query[edge] = position >= begin && position < end && types[position] == kQueryToken;
  }
#pragma unroll
  for (int word = 0; word < kScannedWords; ++word) {
    mask[word] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = words[2 * word + i];
      mask[word] |= (query_bits(four.x) | query_bits(four.y) << 4 | query_bits(four.z) << 8 | query_bits(four.w) << 12)
                    << (16 * i);
    }
#pragma unroll
    for (int edge = 0; edge < 2; ++edge) {
      const uint32_t bits = __ballot_sync(kFullMask, query[edge]) & 0xffff;
      const int64_t shift = edges[edge] - first - 32 * word;
      if (shift == 0 || shift == 16) mask[word] |= bits << shift;
    }
  }
}

// Clears the bits of positions from `first` on whose block of a paged cache does not exist.
__device__ __forceinline__ void clear_missing(const ScoreParameters& p, const Sequence& s, int64_t first,
                                              uint32_t (&mask)[kScannedWords]) {
  for (int64_t begin = first < 0 ? 0 : first; begin < first + kScanned && begin < s.length;) {
    const int32_t page = static_cast<int32_t>(begin) / p.page_size;
    const int64_t end = (int64_t(page) + 1) * p.page_size;
    if (key_offset(p, s, static_cast<int32_t>(begin)) < 0)
#pragma unroll
      for (int word = 0; word < kScannedWords; ++word) {
        const int64_t from = clamp_to(begin - first - 32 * word, 0, 32), to = clamp_to(end - first - 32 * word, 0, 32);
        if (from < to) mask[word] &= ~(~0u >> (32 - (to - from)) << from);
      }
    begin = end;
  }
}

// Finds up to `limit` query rows from position `next` on, advances `next` past them and returns their number. Called by
// the whole block with equal arguments; ends with a barrier if there are positions to search.
__device__ __forceinline__ int32_t next_rows(const ScoreParameters& p, const Sequence& s, int32_t& next, int32_t limit,
                                             RowTile& tile) {
  for (int i = threadIdx.x; i < kTileRows; i += kScoreThreads) tile.position[i] = -1;
  int32_t count = 0;
  while (next < s.length && count < limit) {
    const int64_t start = int64_t(next) - static_cast<int64_t>(reinterpret_cast<uint64_t>(s.types + next) % 16);
    uint32_t mask[kScannedWords], number = 0;
    query_mask(s.types, start, next, s.length, mask);
    if (s.table) clear_missing(p, s, start + int64_t(threadIdx.x) * kScanned, mask);
#pragma unroll
    for (int word = 0; word < kScannedWords; ++word) number += static_cast<uint32_t>(__popc(mask[word]));
    const uint32_t up_to_lane = warp_inclusive_scan(number);
    if (lane_id() == kWarp - 1) tile.found[warp_id()] = up_to_lane;
    __syncthreads();
    uint32_t before = count + up_to_lane - number;
#pragma unroll
    for (unsigned warp = 0; warp < kScoreWarps; ++warp) {
      count += static_cast<int32_t>(tile.found[warp]);
      if (warp < warp_id()) before += tile.found[warp];
    }
    for (unsigned lanes = __ballot_sync(kFullMask, number > 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int32_t first = static_cast<int32_t>(start + (int64_t(warp_id() * kWarp) + lane) * kScanned);
      int32_t place = static_cast<int32_t>(__shfl_sync(kFullMask, before, lane));
#pragma unroll
      for (int word = 0; word < kScannedWords; ++word) {
        const uint32_t bits = __shfl_sync(kFullMask, mask[word], lane);
        const int32_t at = place + __popc(bits & ((1u << lane_id()) - 1));
        int32_t* to = at < limit ? &tile.position[at] : &tile.next;
        if ((bits >> lane_id() & 1) && at <= limit) *to = first + 32 * word + static_cast<int32_t>(lane_id());
        place += __popc(bits);
      }
    }
    __syncthreads();
    next = count > limit ? tile.next : static_cast<int32_t>(clamp_to(start + kScoreThreads * kScanned, 0, s.length));
  }
  return count < limit ? count : limit;
}

// The query rows of one sequence after the other, tile by tile.
class Rows {
 public:
  int32_t base = 0, count = 0;  // `base` rows before this tile, `count` in it

  // Begins with sequence b. If the previous one was the same and has a single tile of rows, shared memory has them.
  __device__ __forceinline__ void start(const Sequence& s, int32_t b) {
    found_ = b == sequence_ && base == 0 && !more_;
    if (found_) return;
    sequence_ = b;
    next_ = s.first < 0 ? 0 : s.first;
    base = count = 0;
    more_ = true;
  }

  // Finds the next tile; false if there is none. Called by the whole block; a barrier must separate it from uses of the
  // previous tile.
  __device__ __forceinline__ bool advance(const ScoreParameters& p, const Sequence& s, RowTile& tile) {
    if (found_) {
      found_ = false;
      return count > 0;
    }
    if (!more_) return false;
    base += count;
    const int32_t left = p.max_rows - base;
    count = next_rows(p, s, next_, left < kTileRows ? left : kTileRows, tile);
    more_ = next_ < s.length && base + count < p.max_rows;
    return count > 0;
  }

  __device__ __forceinline__ bool more() const { return more_; }  // another search is worth it

 private:
  int32_t sequence_ = -1, next_ = 0;
  bool found_ = false, more_ = false;
};

}  // namespace mustdrop
