// SPDX-License-Identifier: Apache-2.0
// What compact_kv_ and compact_paged_kv_ ask of their arguments.
#pragma once

#include "common/stable.h"
#include "compact_kv/disjoint.h"

namespace mustdrop {

inline std::string item(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

inline void check_not_expanded(const char* op, const std::string& argument, const Tensor& t) {
  for (int64_t d = 0; d < t.dim() && t.numel() != 0; ++d)
    MUSTDROP_CHECK(t.size(d) <= 1 || t.stride(d) != 0, op, argument, " must not be expanded (stride 0), got strides ",
                   to_text(t.strides()));
}

// Pairs of caches: 4-D, equal but for head_dim, alike in their first `shared` dimensions.
inline void check_caches(const char* op, const Tensors& keys, const Tensors& values, const Tensor& like,
                         const char* shape, int64_t shared, bool any_strides) {
  MUSTDROP_CHECK(values.size() == keys.size(), op, "values", " must hold as many tensors as keys (", keys.size(),
                 "), got ", values.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const Tensor &key = keys[i], &value = values[i];
    check_dim(op, item("keys", i), key, 4, shape);
    check_device(op, item("keys", i), key, like);
    if (!any_strides) check_last_contiguous(op, item("keys", i), key);
    check_dim(op, item("values", i), value, 4, shape);
    check_shape(op, item("values", i), value, {key.size(0), key.size(1), key.size(2), value.size(3)});
    check_device(op, item("values", i), value, like);
    if (!any_strides) check_last_contiguous(op, item("values", i), value);
    for (int64_t d = 0; d < shared; ++d)
      MUSTDROP_CHECK(key.size(d) == keys[0].size(d), op, item("keys", i), " must agree with keys[0] in dimension ", d,
                     ", got ", shape_of(key));
    check_not_expanded(op, item("keys", i), key);
    check_not_expanded(op, item("values", i), value);
  }
}

// One keep set: (B, K) with (B), or (B, Hk, K) with (B, Hk).
inline void check_keep_set(const char* op, size_t i, const Tensor& keep, const Tensor& counts, int64_t batch,
                           int64_t heads, const Tensor& like) {
  const std::string name = item("keep", i);
  MUSTDROP_CHECK(keep.dim() == 2 || keep.dim() == 3, op, name, " must be (B, K) or (B, Hk, K), got ", shape_of(keep));
  std::vector<int64_t> leading{batch};
  if (keep.dim() == 3) leading.push_back(heads);
  std::vector<int64_t> shape = leading;
  shape.push_back(keep.size(keep.dim() - 1));
  check_shape(op, name, keep, shape);
  check_dtype(op, name, keep, ScalarType::Long);
  check_device(op, name, keep, like);
  check_last_contiguous(op, name, keep);
  check_shape(op, item("counts", i), counts, leading);
  check_dtype(op, item("counts", i), counts, ScalarType::Int);
  check_device(op, item("counts", i), counts, like);
}

// One keep set for all layers, or one per layer.
inline void check_keep(const char* op, const Tensors& keep, const Tensors& counts, const Tensors& keys, int64_t batch,
                       int64_t head_dim, const Tensor& like) {
  const size_t layers = keys.size();
  MUSTDROP_CHECK(keep.size() == 1 || keep.size() == layers, op, "keep", " must hold one tensor or one per layer (",
                 layers, "), got ", keep.size());
  MUSTDROP_CHECK(counts.size() == keep.size(), op, "counts", " must hold as many tensors as keep (", keep.size(),
                 "), got ", counts.size());
  for (size_t i = 0; i < keep.size(); ++i) {
    check_keep_set(op, i, keep[i], counts[i], batch, keys[i].size(head_dim), like);
    if (keep[i].dim() == 2 || keep.size() > 1) continue;
    for (const Tensor& key : keys)
      MUSTDROP_CHECK(key.size(head_dim) == keys[0].size(head_dim), op, item("keep", i),
                     " must be (B, K) where layers differ in heads, got ", shape_of(keep[i]));
  }
}

inline void check_compact_kv(const Tensors& keys,      // [B, Hk, L, D] each
                             const Tensors& values,    // [B, Hk, L, D] each
                             const Tensors& keep,      // [B, K] or [B, Hk, K]
                             const Tensors& counts) {  // [B] or [B, Hk]
  constexpr const char* op = "compact_kv_";
  if (keys.empty()) {
    MUSTDROP_CHECK(values.empty(), op, "values", " must hold as many tensors as keys (0), got ", values.size());
    return;
  }
  check_caches(op, keys, values, keys[0], "(B, Hk, L, D)", 1, false);
  check_keep(op, keep, counts, keys, keys[0].size(0), 1, keys[0]);
  check_disjoint(op, keys, values, keep, counts);
}

inline void check_compact_paged_kv(const Tensors& keys,             // [blocks, slots, Hk, D] each
                                   const Tensors& values,           // [blocks, slots, Hk, D] each
                                   const Tensor& block_table,       // [B, max_blocks]
                                   const Tensors& keep,             // [B, K] or [B, Hk, K]
                                   const Tensors& counts,           // [B] or [B, Hk]
                                   const OptionalTensor& seq_lens,  // [B]
                                   bool align_end) {
  constexpr const char* op = "compact_paged_kv_";
  check_caches(op, keys, values, block_table, "(blocks, slots, Hk, D)", 2, true);
  check_dim(op, "block_table", block_table, 2, "(B, max_blocks)");
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_last_contiguous(op, "block_table", block_table);
  const int64_t batch = block_table.size(0);
  MUSTDROP_CHECK(seq_lens || !align_end, op, "seq_lens", " must be given with align_end");
  if (seq_lens) {
    check_shape(op, "seq_lens", *seq_lens, {batch});
    check_dtype(op, "seq_lens", *seq_lens, ScalarType::Int);
    check_device(op, "seq_lens", *seq_lens, block_table);
  }
  if (keys.empty()) return;
  MUSTDROP_CHECK(keys[0].size(1) >= 1, op, "keys[0]", " must be at least 1 slot a block, got ", shape_of(keys[0]));
  check_keep(op, keep, counts, keys, batch, 2, block_table);
  check_disjoint(op, keys, values, keep, counts, &block_table, seq_lens);
}

}  // namespace mustdrop
