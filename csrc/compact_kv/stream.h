// SPDX-License-Identifier: Apache-2.0
// One stream of a compaction: the kept positions of one sequence, in one or several heads of one cache, moved in place.
//
// Kept positions ascend, so position keep[i] >= i moves to the front; in order, a move only overwrites sources of
// earlier moves. To the end (align_end) the same holds from the last move to the first. Streams access different bytes,
// so their order is free.
#pragma once

#include <cstdint>
#include <cstring>

namespace mustdrop {

// Layout of one position in a stream: heads x dims pieces of `run` bytes. Strides in bytes.
struct PositionLayout {
  int64_t heads;
  int64_t head_stride;
  int64_t dims;  // 1 if head_dim is contiguous
  int64_t dim_stride;
  int64_t run;
};

// Maps positions to slots: position p is in block table[p / page_size], slot p % page_size. A dense cache is one block
// without a table.
struct SlotMap {
  const int32_t* table;  // [blocks of the sequence]; null: the identity
  int64_t table_size;
  int64_t blocks;  // of the cache
  int64_t page_size;
  int64_t block_stride;  // bytes
  int64_t slot_stride;
};

struct Stream {
  char* data;  // the cache at the stream's first head
  PositionLayout layout;
  SlotMap map;
  const int64_t* keep;  // [K]
  int64_t count;        // moves
  int64_t target;       // position of the first move's target; may be negative
  bool backward;        // align_end: the last move comes first
};

// Offsets of positions; caches the block of the last one, which most neighbors share.
class SlotLookup {
 public:
  explicit SlotLookup(const SlotMap& map) : map_(map) {}

  // Sets a position's offset in bytes; returns false if it is outside the cache.
  bool find(int64_t position, int64_t& offset) {
    if (position < begin_ || position >= end_) {
      if (!enter_block(position)) return false;
    }
    offset = base_ + (position - begin_) * map_.slot_stride;
    return true;
  }

 private:
  bool enter_block(int64_t position) {
    if (position < 0) return false;
    const int64_t entry = position / map_.page_size;
    if (entry >= map_.table_size) return false;
    const int64_t block = map_.table ? map_.table[entry] : entry;
    if (block < 0 || block >= map_.blocks) return false;
    begin_ = entry * map_.page_size;
    end_ = begin_ + map_.page_size;
    base_ = block * map_.block_stride;
    return true;
  }

  const SlotMap& map_;
  int64_t begin_ = 0, end_ = 0, base_ = 0;  // of the cached block: positions [begin, end), offset
};

// Consecutive moves whose sources and whose targets are adjacent in memory.
struct Run {
  int64_t from;  // offset in bytes of the lowest position
  int64_t to;
  int64_t count;
};

// Moves `count` elements `stride` bytes apart, in order or last to first.
template <class Element>
void move_elements(char* to, const char* from, int64_t count, int64_t stride, bool backward) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = backward ? count - 1 - n : n;
    Element value;
    std::memcpy(&value, from + i * stride, sizeof value);
    std::memcpy(to + i * stride, &value, sizeof value);
  }
}

inline void move_pieces(char* to, const char* from, int64_t count, int64_t stride, int64_t bytes, bool backward) {
  switch (bytes) {
    case 1:
      return move_elements<uint8_t>(to, from, count, stride, backward);
    case 2:
      return move_elements<uint16_t>(to, from, count, stride, backward);
    case 4:
      return move_elements<uint32_t>(to, from, count, stride, backward);
    case 8:
      return move_elements<uint64_t>(to, from, count, stride, backward);
    default:
      for (int64_t n = 0; n < count; ++n) {
        const int64_t i = backward ? count - 1 - n : n;
        std::memmove(to + i * stride, from + i * stride, bytes);
      }
  }
}

// Moves the pieces of one position. They do not overlap, so their order is free.
inline void move_position(const PositionLayout& layout, char* to, const char* from) {
  for (int64_t h = 0; h < layout.heads; ++h)
    move_pieces(to + h * layout.head_stride, from + h * layout.head_stride, layout.dims, layout.dim_stride, layout.run,
                false);
}

inline void move_run(const Stream& stream, const Run& run) {
  const PositionLayout& layout = stream.layout;
  char* to = stream.data + run.to;
  const char* from = stream.data + run.from;
  const int64_t stride = stream.map.slot_stride;
  if (run.count > 1 && stride == layout.run) {  // positions are contiguous: one move per piece
    for (int64_t h = 0; h < layout.heads; ++h)
      for (int64_t d = 0; d < layout.dims; ++d) {
        const int64_t offset = h * layout.head_stride + d * layout.dim_stride;
        std::memmove(to + offset, from + offset, run.count * layout.run);
      }
    return;
  }
  for (int64_t n = 0; n < run.count; ++n) {
    const int64_t i = stream.backward ? run.count - 1 - n : n;
    move_position(layout, to + i * stride, from + i * stride);
  }
}

// Sources are scattered, beyond the hardware prefetchers: prefetch this many moves ahead.
constexpr int64_t kLookahead = 8;
constexpr int64_t kLookaheadBytes = 1024;  // of each position; the hardware prefetches the rest

class Prefetcher {
 public:
  explicit Prefetcher(const Stream& stream) : stream_(stream), lookup_(stream.map) {}

  void prefetch(int64_t n) {
    n += kLookahead;
    int64_t offset;
    if (n >= stream_.count) return;
    if (!lookup_.find(stream_.keep[stream_.backward ? stream_.count - 1 - n : n], offset)) return;
    const char* from = stream_.data + offset;
    for (int64_t byte = 0; byte < stream_.layout.run && byte < kLookaheadBytes; byte += 64)
      __builtin_prefetch(from + byte);
  }

 private:
  const Stream& stream_;
  SlotLookup lookup_;
};

inline void compact(const Stream& stream) {
  SlotLookup sources(stream.map), targets(stream.map);
  Prefetcher prefetcher(stream);
  const int64_t step = stream.map.slot_stride;
  Run run{0, 0, 0};
  for (int64_t n = 0; n < stream.count; ++n) {
    const int64_t i = stream.backward ? stream.count - 1 - n : n;
    int64_t from, to;
    prefetcher.prefetch(n);
    if (!sources.find(stream.keep[i], from) || !targets.find(stream.target + i, to) || from == to) continue;
    const int64_t next =
        stream.backward ? -step : run.count * step;  // continuation of the run, from its lowest position
    if (run.count && from == run.from + next && to == run.to + next) {
      if (stream.backward) run.from = from, run.to = to;
      ++run.count;
      continue;
    }
    if (run.count) move_run(stream, run);
    run = {from, to, 1};
  }
  if (run.count) move_run(stream, run);
}

}  // namespace mustdrop
