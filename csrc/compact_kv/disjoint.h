// SPDX-License-Identifier: Apache-2.0
// Caches that are changed in place must not share memory with one another, nor with the tensors that direct the moves.
#pragma once

#include <numeric>

#include "common/checks.h"
#include "common/overlap.h"

namespace mustdrop {

// The memory of one argument.
struct ArgumentMemory {
  Argument argument;
  StridedView view;
  bool writes;
};

// The memory that a call reads and writes.
class CallMemory {
 public:
  explicit CallMemory(const char* op) : op_(op) {}

  void add(const Argument& argument, const Tensor& t, bool writes) {
    if (t.numel() == 0) return;
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t element = static_cast<int64_t>(t.element_size());
    ArgumentMemory memory{argument, {}, writes};
    for (size_t d = 0; d < sizes.size(); ++d)
      if (strides[d] != 0) memory.view.add(sizes[d], strides[d] * element);  // what is read may be expanded
    memory.view.close(reinterpret_cast<int64_t>(t.const_data_ptr()), element);
    if (writes && overlaps_itself(memory.view))
      refuse_argument(op_, argument, "must have each element at an address of its own, got strides ",
                      tuple_text(strides));
    arguments_.push_back(memory);
  }

  void add(const char* list, const Tensors& tensors, bool writes) {
    for (size_t i = 0; i < tensors.size(); ++i) add({list, static_cast<int64_t>(i)}, tensors[i], writes);
  }

  // In the order of addresses only neighbors meet, unless views of one buffer lie within each other.
  void check_disjoint() const {
    std::vector<size_t> order(arguments_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    const auto view = [&](size_t place) -> const StridedView& { return arguments_[order[place]].view; };
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return arguments_[a].view.begin < arguments_[b].view.begin; });
    for (size_t i = 0; i < order.size(); ++i)
      for (size_t j = i + 1; j < order.size() && view(j).begin < view(i).end; ++j) {
        const auto [first, second] = std::minmax(order[i], order[j]);
        const ArgumentMemory &a = arguments_[first], &b = arguments_[second];
        if ((a.writes || b.writes) && share_memory(a.view, b.view))
          refuse_argument(op_, b.argument, "must not share memory with ", a.argument.text());
      }
  }

 private:
  const char* op_;
  std::vector<ArgumentMemory> arguments_;
};

inline void check_disjoint(const char* op, const Tensors& keys, const Tensors& values, const Tensors& keep,
                           const Tensors& counts, const Tensor* block_table = nullptr,
                           const OptionalTensor& seq_lens = {}) {
  CallMemory memory(op);
  memory.add("keys", keys, true);
  memory.add("values", values, true);
  if (block_table) memory.add(Argument("block_table"), *block_table, false);
  memory.add("keep", keep, false);
  memory.add("counts", counts, false);
  if (seq_lens) memory.add(Argument("seq_lens"), *seq_lens, false);
  memory.check_disjoint();
}

}  // namespace mustdrop
