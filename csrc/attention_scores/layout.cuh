// SPDX-License-Identifier: Apache-2.0
// Sequences of dense, packed and paged tensors behind one interface, `sequence_at` and `key_offset`. Values that only
// the device holds (lengths, block numbers) are clamped here to the extents of the tensors.
#pragma once

#include "common/device.cuh"
#include "common/token_types.h"

namespace mustdrop {

// Contribution of one part of the keys to the normalizer of one row and head, in units of log2.
struct alignas(8) RowPart {
  float maximum, sum;  // sum of 2^(x - maximum)
};

// Strides in elements.
struct ScoreParameters {
  const void* q;               // [B, Hq, Lq, D], packed [total_q, Hq, D]
  const void* k;               // [B, Hk, Lk, D], packed [total_k, Hk, D], paged [blocks, page_size, Hk, D]
  const float* lse;            // [B, Hq, Lq], packed [Hq, total_q]; null: computed from the keys
  const uint8_t* token_types;  // [B, Lk], packed [total_k]
  const int32_t* cu_q;         // [B+1]; null: dense
  const int32_t* cu_k;         // [B+1]; null: dense or paged
  const int32_t* seq_lens;     // [B]; null: not paged
  const int32_t* table;        // [B, max_blocks]; null: not paged
  float* total;                // [B, Lk], packed [total_k]; null for text_vision_attention
  float* peak;                 // as total
  float* map;                  // [B, max_rows, Lk]; null for the scores
  RowPart* parts;              // [B, Hq, row_capacity, part_count], workspace; null where lse is given
  float* partials;  // [B, tiles, splits, row_capacity, tile keys], workspace; null: the heads are summed in the kernel

  int64_t q_batch, q_head, q_row;
  int64_t k_batch, k_head, k_row, k_dim;  // k_row: of a slot where keys are paged
  int64_t k_block;
  int64_t lse_batch, lse_head, lse_row;
  // From one slab of a head to the next one, and from the last slab to the first of the next head, or of the same one.
  int64_t k_slab, k_next_head, k_same_head, q_next_head;
  int64_t type_batch, table_batch;
  int32_t batch, heads, dim;
  int32_t group;                 // query heads of a key head
  int32_t rows, keys;            // dense: Lq and Lk; packed: total_q and total_k; paged: total_q and max_len
  int32_t max_rows_q, max_keys;  // upper bounds of a sequence's rows and keys
  int32_t blocks, page_size, max_blocks;
  int32_t max_rows;      // query rows past it are ignored
  int32_t row_capacity;  // query rows of a sequence in a workspace
  int32_t tiles;         // key tiles of a sequence
  int32_t split_bits;    // log2 of the blocks that share the heads of a tile
  int32_t part_splits;   // blocks that share the keys of a head in the normalizer
  int32_t part_count;    // parts of a row and head that they write: one if they are a cluster
  int32_t part_tiles;    // key tiles of a block
  float scale_log2;      // scale * log2(e)
  float head_share;      // 1 / Hq
};

struct Sequence {
  int64_t q, k, lse, out;  // offsets of its first row, key, normalizer and result, in elements
  const uint8_t* types;    // [length]
  const int32_t* table;    // [max_blocks] or null
  int32_t first;           // position of its first row; negative if there are more rows than keys
  int32_t length;          // keys
  int32_t places;          // results of its own, padding included
};

struct Span {
  int32_t begin, length;
};

__device__ __forceinline__ Span span_at(const int32_t* cumulative,  // [B+1]
                                        int32_t b, int32_t extent, int32_t longest) {
  const int64_t begin = clamp_to(cumulative[b], 0, extent), end = clamp_to(cumulative[b + 1], 0, extent);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(clamp_to(end - begin, 0, longest))};
}

__device__ __forceinline__ Sequence sequence_at(const ScoreParameters& p, int32_t b) {
  Sequence s{};
  int32_t rows = p.rows;
  if (p.cu_q) {
    const Span span = span_at(p.cu_q, b, p.rows, p.max_rows_q);
    rows = span.length;
    s.q = span.begin * p.q_row;
    s.lse = span.begin * p.lse_row;
  } else {
    s.q = b * p.q_batch;
    s.lse = b * p.lse_batch;
  }
  if (p.cu_k) {
    const Span span = span_at(p.cu_k, b, p.keys, p.max_keys);
    s.length = s.places = span.length;
    s.k = span.begin * p.k_row;
    s.out = span.begin;
    s.types = p.token_types + span.begin;
  } else {
    s.length = p.seq_lens ? static_cast<int32_t>(clamp_to(p.seq_lens[b], 0, p.max_keys)) : p.keys;
    s.places = p.keys;
    s.k = b * p.k_batch;
    s.out = int64_t(b) * p.keys;
    s.types = p.token_types + b * p.type_batch;
    if (p.table) s.table = p.table + b * p.table_batch;
  }
  s.first = s.length - rows;
  return s;
}

// Offset of a position's key in elements of k; -1 if there is none.
__device__ __forceinline__ int64_t key_offset(const ScoreParameters& p, const Sequence& s, int32_t position) {
  if (position >= s.length) return -1;
  if (!s.table) return s.k + position * p.k_row;
  const int32_t block = s.table[position / p.page_size];
  if (block < 0 || block >= p.blocks) return -1;
  return block * p.k_block + position % p.page_size * p.k_row;
}

}  // namespace mustdrop
