// SPDX-License-Identifier: Apache-2.0
// Argument checks of compact_kv_ and compact_paged_kv_.
#pragma once

#include "common/checks.h"
#include "compact_kv/disjoint.h"

namespace mustdrop {

// Differences between dense and paged caches.
struct CacheLayout {
  const char* names[4];  // of the dimensions
  int64_t shared;        // leading dimensions in which all layers agree
  int64_t heads;         // index of the dimension Hk
  bool any_strides;
};

constexpr CacheLayout kDenseCache{{"B", "Hk", "L", "D"}, 1, 1, false};
constexpr CacheLayout kPagedCache{{"blocks", "page_size", "Hk", "D"}, 2, 2, true};

inline void check_cache(const char* op, const Argument& argument, const Tensor& t, Shape shape,
                        const CacheLayout& layout, const Tensor& like) {
  check_shape(op, argument, t, shape);
  check_device(op, argument, t, like);
  if (!layout.any_strides) check_last_contiguous(op, argument, t);
}

inline void check_not_expanded(const char* op, const Argument& argument, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size() && t.numel() != 0; ++d)
    if (sizes[d] > 1 && strides[d] == 0)
      refuse_argument(op, argument, "must not be expanded (stride 0), got strides ", tuple_text(strides));
}

// Pairs of 4-D caches, equal but for head_dim. `like` decides the device; null without layers.
inline void check_caches(const char* op, const Tensors& keys, const Tensors& values, const CacheLayout& layout,
                         const Tensor* like) {
  if (values.size() != keys.size())
    refuse_argument(op, "values", "must hold as many tensors as keys (", keys.size(), "), got ", values.size());
  const auto& names = layout.names;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Argument key("keys", i), value("values", i);
    check_cache(op, key, keys[i], {names[0], names[1], names[2], names[3]}, layout, *like);
    check_cache(op, value, values[i], {keys[i].size(0), keys[i].size(1), keys[i].size(2), "D"}, layout, *like);
    for (int64_t d = 0; d < layout.shared; ++d)
      if (keys[i].size(d) != keys[0].size(d))
        refuse_argument(op, key, "must agree with keys[0] in ", names[d], ", got ", tuple_text(keys[i].sizes()));
    check_not_expanded(op, key, keys[i]);
    check_not_expanded(op, value, values[i]);
  }
}

// Keep sets: one for all layers or one per layer.
inline void check_lengths(const char* op, const Tensors& keep, const Tensors& counts, const Tensors& keys) {
  if (keep.size() != 1 && keep.size() != keys.size())
    refuse_argument(op, "keep", "must hold one tensor or one per layer (", keys.size(), "), got ", keep.size());
  if (counts.size() != keep.size())
    refuse_argument(op, "counts", "must hold as many tensors as keep (", keep.size(), "), got ", counts.size());
}

// Each keep set is (B, K) with counts (B), or (B, Hk, K) with counts (B, Hk).
inline void check_keep_sets(const char* op, const Tensors& keep, const Tensors& counts, const Tensors& keys,
                            const CacheLayout& layout, int64_t batch, const Tensor& like) {
  for (size_t i = 0; i < keep.size(); ++i) {
    const Argument set("keep", i), count("counts", i);
    const int64_t heads = keys[i].size(layout.heads);
    if (keep[i].dim() == 2) {
      check_tensor(op, set, keep[i], {batch, "K"}, ScalarType::Long, like);
      check_tensor(op, count, counts[i], {batch}, ScalarType::Int, like, true);
    } else if (keep[i].dim() == 3) {
      check_tensor(op, set, keep[i], {batch, heads, "K"}, ScalarType::Long, like);
      check_tensor(op, count, counts[i], {batch, heads}, ScalarType::Int, like, true);
      for (size_t layer = 0; keep.size() == 1 && layer < keys.size(); ++layer)
        if (keys[layer].size(layout.heads) != heads)
          refuse_argument(op, set, "must be (B, K) where layers differ in heads, got ", tuple_text(keep[i].sizes()));
    } else {
      refuse_argument(op, set, "must be (B, K) or (B, Hk, K), got ", tuple_text(keep[i].sizes()));
    }
  }
}

inline void check_compact_kv(const Tensors& keys,      // [B, Hk, L, D] each
                             const Tensors& values,    // [B, Hk, L, D] each
                             const Tensors& keep,      // [B, K] or [B, Hk, K]; one, or one per layer
                             const Tensors& counts) {  // [B] or [B, Hk]
  constexpr const char* op = "compact_kv_";
  check_caches(op, keys, values, kDenseCache, keys.data());
  check_lengths(op, keep, counts, keys);
  if (keys.empty()) return;
  check_keep_sets(op, keep, counts, keys, kDenseCache, keys[0].size(0), keys[0]);
  check_disjoint(op, keys, values, keep, counts);
}

inline void check_compact_paged_kv(const Tensors& keys,             // [blocks, page_size, Hk, D] each
                                   const Tensors& values,           // [blocks, page_size, Hk, D] each
                                   const Tensor& block_table,       // [B, max_blocks]
                                   const Tensors& keep,             // [B, K] or [B, Hk, K]; one, or one per layer
                                   const Tensors& counts,           // [B] or [B, Hk]
                                   const OptionalTensor& seq_lens,  // [B]
                                   bool align_end) {
  constexpr const char* op = "compact_paged_kv_";
  check_caches(op, keys, values, kPagedCache, &block_table);
  check_tensor(op, "block_table", block_table, {"B", "max_blocks"}, ScalarType::Int, block_table);
  const int64_t batch = block_table.size(0);
  if (align_end && !seq_lens) refuse_argument(op, "seq_lens", "must be given with align_end");
  if (seq_lens) check_tensor(op, "seq_lens", *seq_lens, {batch}, ScalarType::Int, block_table, true);
  check_lengths(op, keep, counts, keys);
  if (keys.empty()) return;
  check_at_least(op, {"keys", 0}, keys[0].size(1), 1);
  check_keep_sets(op, keep, counts, keys, kPagedCache, batch, block_table);
  check_disjoint(op, keys, values, keep, counts, &block_table, seq_lens);
}

}  // namespace mustdrop
