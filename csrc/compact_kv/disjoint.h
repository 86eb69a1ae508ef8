// SPDX-License-Identifier: Apache-2.0
// Caches that are changed in place must not share memory: not with one another, not with what says where things go.
#pragma once

#include <numeric>

#include "common/overlap.h"
#include "common/stable.h"

namespace mustdrop {

// What a call reads or writes, and what it is called.
struct Claim {
  const char* list;
  int64_t entry;  // -1: no list
  Strided bytes;
  bool writes;

  std::string text() const { return entry < 0 ? list : list + ("[" + std::to_string(entry) + "]"); }
};

class Claims {
 public:
  explicit Claims(const char* op) : op_(op) {}

  void add(const char* list, int64_t entry, const Tensor& t, bool writes) {
    if (t.numel() == 0) return;
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t element = static_cast<int64_t>(t.element_size());
    Claim claim{list, entry, {}, writes};
    for (size_t d = 0; d < sizes.size(); ++d)
      if (strides[d] != 0) claim.bytes.add(sizes[d], strides[d] * element);  // what is read may be expanded
    claim.bytes.close(reinterpret_cast<int64_t>(t.const_data_ptr()), element);
    if (writes && overlaps_itself(claim.bytes))
      refuse(op_, claim.text(), " must have each element at an address of its own, got strides ", to_text(strides));
    claims_.push_back(claim);
  }

  void add(const char* list, const std::vector<Tensor>& tensors, bool writes) {
    for (size_t i = 0; i < tensors.size(); ++i) add(list, static_cast<int64_t>(i), tensors[i], writes);
  }

  // In the order of addresses only neighbours meet, unless views of one buffer lie within each other.
  void check() const {
    std::vector<size_t> order(claims_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return claims_[a].bytes.begin < claims_[b].bytes.begin; });
    for (size_t i = 0; i < order.size(); ++i)
      for (size_t j = i + 1; j < order.size() && claims_[order[j]].bytes.begin < claims_[order[i]].bytes.end; ++j) {
        const Claim &first = claims_[std::min(order[i], order[j])], &second = claims_[std::max(order[i], order[j])];
        if ((first.writes || second.writes) && share_memory(first.bytes, second.bytes))
          refuse(op_, second.text(), " must not share memory with ", first.text());
      }
  }

 private:
  const char* op_;
  std::vector<Claim> claims_;
};

using Tensors = std::vector<Tensor>;

inline void check_disjoint(const char* op, const Tensors& keys, const Tensors& values, const Tensors& keep,
                           const Tensors& counts, const Tensor* block_table = nullptr,
                           const OptionalTensor& seq_lens = {}) {
  Claims claims(op);
  claims.add("keys", keys, true);
  claims.add("values", values, true);
  if (block_table) claims.add("block_table", -1, *block_table, false);
  claims.add("keep", keep, false);
  claims.add("counts", counts, false);
  if (seq_lens) claims.add("seq_lens", -1, *seq_lens, false);
  claims.check();
}

}  // namespace mustdrop
