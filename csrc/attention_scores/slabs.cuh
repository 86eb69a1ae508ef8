// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies of slabs of keys and query rows to shared memory, and the ring that they pass.
#pragma once

#include "attention_scores/tile.cuh"

namespace mustdrop {

constexpr int kCopyRows = kScoreThreads / kPieces;  // rows that the block copies at once, 16 bytes a thread

// Whether this thread's piece is among the steps of 32 bytes that begin before `depth`; the product skips the others.
template <class T>
__device__ __forceinline__ bool copies_piece(int32_t depth) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  return static_cast<int>(threadIdx.x) % kPieces / 2 * 2 * kElements < depth;
}

template <bool kVector>
struct SlabOffset {
  using Type = uint32_t;  // in units of 16 bytes
};
template <>
struct SlabOffset<false> {
  using Type = int64_t;  // in elements
};

// Up to kRows rows of operands of a head. This thread copies one piece of every kCopyRows-th row; the offsets of these
// rows from the head's first element do not depend on head and slab and are in registers.
template <class T, bool kVector, int kRows>
struct SlabRows {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));  // of a piece
  typename SlabOffset<kVector>::Type offset[kRows / kCopyRows];

  // offset_of(row) in elements, not negative.
  template <class OffsetOf>
  __device__ __forceinline__ void locate(const OffsetOf& offset_of) {
#pragma unroll
    for (int i = 0; i < kRows / kCopyRows; ++i)
      offset[i] = static_cast<typename SlabOffset<kVector>::Type>(
          static_cast<uint64_t>(offset_of(static_cast<int>(threadIdx.x) / kPieces + i * kCopyRows)) /
          (kVector ? kElements : 1));
  }

  // Starts the copy of one slab of the first `count` rows; of zeros unless `there`. Elements past `depth` become zeros.
  // Called by the threads with copies_piece().
  __device__ __forceinline__ void stage(char* to,       // [kRows, kSlabBytes] in shared memory
                                        const T* slab,  // the slab's first element of the head's first row
                                        int count, int32_t depth, int64_t dim_stride, bool there = true) const {
    const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
    const int32_t left = depth - piece * kElements;
    to += piece_at(row, piece);
    const T* from = slab + piece * kElements * dim_stride;
#pragma unroll
    for (int i = 0; i < kRows / kCopyRows; ++i) {
      if (count < kRows && row + i * kCopyRows >= count) continue;
      char* at = to + i * kCopyRows * kSlabBytes;  // the rows of a thread have the same swizzle
      if constexpr (kVector) {
        copy16_async(at, piece_after(from, offset[i]), there && left > 0);
      } else {
        Pack<T, kElements> pack;
#pragma unroll
        for (int e = 0; e < kElements; ++e) pack.at[e] = there && e < left ? from[offset[i] + e * dim_stride] : T{};
        store_pack(reinterpret_cast<T*>(at), pack);
      }
    }
  }
};

// The keys of a tile, in shared memory.
template <int M>
struct KeyPlaces {
  int64_t offset[kTileKeys<M>];         // in elements, of the keys of the mask
  uint32_t mask[kTileKeys<M> / kWarp];  // a bit for each key that counts
};

// What one thread has found about one key.
struct KeyPlace {
  int64_t offset;  // in elements; -1: there is none
  uint8_t type;
};

__device__ __forceinline__ KeyPlace find_key(const ScoreParameters& p, const Sequence& s, int64_t position) {
  if (position >= s.length) return {-1, kPaddingToken};
  return {key_offset(p, s, static_cast<int32_t>(position)), s.types[position]};
}

// Called by the first kTileKeys<M> threads, each with its key.
template <int M>
__device__ __forceinline__ void record_key(KeyPlaces<M>& places, const KeyPlace& key, bool counts) {
  places.offset[threadIdx.x] = key.offset;
  const uint32_t mask = __ballot_sync(kFullMask, counts && key.offset >= 0);
  if (lane_id() == 0) places.mask[warp_id()] = mask;
}

// Index of the first key that counts in a tile; -1 if there is none.
template <int M>
__device__ __forceinline__ int first_key(const KeyPlaces<M>& places) {
  int first = -1;
#pragma unroll
  for (int word = kTileKeys<M> / static_cast<int>(kWarp) - 1; word >= 0; --word)
    if (places.mask[word] != 0) first = 32 * word + __ffs(static_cast<int>(places.mask[word])) - 1;
  return first;
}

// Keys that do not count are not read; the first one that does takes their place. False if there is none.
template <class T, bool kVector, int M>
__device__ __forceinline__ bool locate_keys(SlabRows<T, kVector, kTileKeys<M>>& keys, const KeyPlaces<M>& places) {
  const int first = first_key<M>(places);
  keys.locate([&](int key) {
    const int from = places.mask[key / 32] >> key % 32 & 1 ? key : first;
    return from < 0 ? 0 : places.offset[from];
  });
  return first >= 0;
}

// Rows past `count` repeat the first one.
template <class T, bool kVector>
__device__ __forceinline__ void locate_rows(SlabRows<T, kVector, kTileRows>& rows, const ScoreParameters& p,
                                            const Sequence& s,
                                            const int32_t* position,  // [kTileRows]
                                            int32_t count) {
  rows.locate([&](int row) { return (position[row < count ? row : 0] - s.first) * p.q_row; });
}

// The slots of the ring: `used` holds the unit in use, `staged` receives the one kStages - 1 ahead.
struct Ring {
  int used = 0, staged = kStages - 1;
  __device__ __forceinline__ void advance() {
    staged = used;
    used = used + 1 == kStages ? 0 : used + 1;
  }
};

}  // namespace mustdrop
