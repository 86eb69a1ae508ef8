// SPDX-License-Identifier: Apache-2.0
// Finds the query rows of a sequence, a tile at a time. Their number is on the device only, so every block searches.
//
// A thread reads 64 consecutive positions with four loads of 16 bytes and keeps a bit for each; a scan over the block
// orders them.
#pragma once

#include "attention_scores/layout.cuh"

namespace mustdrop {

constexpr int kTileRows = 128;      // query rows of a tile
constexpr int kScoreThreads = 256;  // of every block but those of cls.cuh
constexpr int kScanned = 64;        // positions of a thread

// A block's query rows, in shared memory.
struct RowTile {
  int32_t position[kTileRows];  // -1 past the rows
  uint32_t scan[kWarp];
  int32_t next;
};

// Bit i is set if byte i of `word` is kQueryToken.
__device__ __forceinline__ uint32_t query_bits(uint32_t word) {
  const uint32_t other = word ^ (kQueryToken * 0x01010101u);  // zero bytes are queries
  const uint32_t zero = ~(((other & 0x7f7f7f7fu) + 0x7f7f7f7fu) | other | 0x7f7f7f7fu);
  return ((zero >> 7) * 0x01020408u) >> 24 & 0xfu;
}

// Mask of the queries in [begin, end) among the 16 positions from `position` on, whose address is a multiple of 16.
__device__ __forceinline__ uint32_t query_mask16(const uint8_t* types, int64_t position, int32_t begin, int32_t end) {
  uint32_t mask = 0;
  if (position >= begin && position + 16 <= end) {
    const uint4 words = *reinterpret_cast<const uint4*>(types + position);
    mask = query_bits(words.x) | query_bits(words.y) << 4 | query_bits(words.z) << 8 | query_bits(words.w) << 12;
  } else {
    for (int i = 0; i < 16; ++i)
      if (position + i >= begin && position + i < end && types[position + i] == kQueryToken) mask |= 1u << i;
  }
  return mask;
}

// Finds up to `limit` query rows from position `next` on, advances `next` past them and returns their number. Called by
// the whole block with equal arguments; ends with a barrier.
__device__ __forceinline__ int32_t next_rows(const ScoreParameters& p, const Sequence& s, int32_t& next, int32_t limit,
                                             RowTile& tile) {
  for (int i = threadIdx.x; i < kTileRows; i += kScoreThreads) tile.position[i] = -1;
  __syncthreads();
  int32_t count = 0;
  while (next < s.length && count < limit) {
    const int64_t start = int64_t(next) - static_cast<int64_t>(reinterpret_cast<uint64_t>(s.types + next) % 16);
    const int64_t mine = start + int64_t(threadIdx.x) * kScanned;
    uint64_t mask = 0;
#pragma unroll
    for (int i = 0; i < kScanned / 16; ++i)
      mask |= uint64_t(query_mask16(s.types, mine + 16 * i, next, s.length)) << (16 * i);
    if (s.table)
      for (int i = 0; i < kScanned; ++i)
        if ((mask >> i & 1) && key_offset(p, s, static_cast<int32_t>(mine + i)) < 0) mask &= ~(uint64_t(1) << i);
    uint32_t found = 0;
    int32_t place =
        count + static_cast<int32_t>(block_exclusive_scan<uint32_t>(
                    static_cast<uint32_t>(__popc(uint32_t(mask))) + static_cast<uint32_t>(__popc(uint32_t(mask >> 32))),
                    tile.scan, found));
    for (int i = 0; mask != 0 && i < kScanned; ++i, mask >>= 1) {
      if (!(mask & 1)) continue;
      if (place < limit) tile.position[place] = static_cast<int32_t>(mine + i);
      if (place == limit) tile.next = static_cast<int32_t>(mine + i);
      ++place;
    }
    __syncthreads();
    count += static_cast<int32_t>(found);
    next = count > limit ? tile.next : static_cast<int32_t>(clamp_to(start + kScoreThreads * kScanned, 0, s.length));
  }
  __syncthreads();
  return count < limit ? count : limit;
}

// The query rows of a sequence, tile by tile.
struct Rows {
  int32_t next, base, count;  // `base` rows before this tile, `count` in it

  __device__ explicit Rows(const Sequence& s) : next(s.first < 0 ? 0 : s.first), base(0), count(0) {}

  __device__ bool advance(const ScoreParameters& p, const Sequence& s, RowTile& tile) {
    base += count;
    const int32_t left = p.max_rows - base;
    count = next_rows(p, s, next, left < kTileRows ? left : kTileRows, tile);
    return count > 0;
  }
};

}  // namespace mustdrop
