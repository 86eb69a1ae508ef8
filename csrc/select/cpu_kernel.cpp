// SPDX-License-Identifier: Apache-2.0
// Which tokens stay. A selection is a set of candidates of which the best `open` stay, by order_key and then by index; the
// key that divides them is found by radix selection, 11 bits at a time, so nothing is sorted and every input, also one
// whose scores are all equal, costs the same few passes.
#include "select/cpu_kernel.h"

#include "common/float_types.h"
#include "common/order.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

enum Fate : uint8_t { kGone = 0, kStays = 1, kCandidate = 2 };
constexpr uint8_t kPadding = 0, kVision = 2;  // token types

constexpr int kDigits = 3;
constexpr int kShift[kDigits] = {21, 10, 0};
constexpr uint32_t kBins[kDigits] = {2048, 2048, 1024};

template <class T>
void make_keys(const T* score, int64_t length, uint32_t* keys) {
  for (int64_t j = 0; j < length; ++j) keys[j] = order_key(to_float(score[j]));
}

// The same bits on every machine: sixteen running sums, added pairwise at the end.
template <class T>
float sum(const T* value, int64_t length) {
  constexpr int kLanes = 16;
  float lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += to_float(value[j + l]);
  for (int l = 0; j + l < length; ++l) lane[l] += to_float(value[j + l]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Candidates are the vision tokens that are not protected; returns their number.
int64_t topk_fates(const uint8_t* types, const uint8_t* keeps, int64_t length, uint8_t* fates, int64_t& safe) {
  int64_t candidates = 0, kept = 0;
  for (int64_t j = 0; j < length; ++j) {
    const bool vision = types[j] == kVision, keep = keeps && keeps[j] != 0;
    fates[j] = types[j] == kPadding ? kGone : vision && !keep ? kCandidate : kStays;
    candidates += vision && !keep;
    kept += vision && keep;
  }
  safe = kept;
  return candidates;
}

// Candidates are the tokens that both thresholds would drop; returns their number.
template <class T>
int64_t dual_fates(const T* total, const T* peak, const uint8_t* types, const uint8_t* keeps, int64_t length,
                   float total_limit, float peak_limit, uint8_t* fates) {
  int64_t candidates = 0;
  for (int64_t j = 0; j < length; ++j) {
    const bool low = (to_float(total[j]) < total_limit) & (to_float(peak[j]) < peak_limit);
    const bool drop = low & (types[j] == kVision) & !(keeps && keeps[j] != 0);
    fates[j] = types[j] == kPadding ? kGone : drop ? kCandidate : kStays;
    candidates += drop;
  }
  return candidates;
}

// What divides the candidates: those above `key` stay, and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// The bin that holds the open-th highest of the keys counted, and how many of that bin are still wanted.
uint32_t cut_bin(const uint32_t* histogram, uint32_t bins, int64_t& open) {
  uint32_t bin = bins;
  while (bin > 1 && histogram[bin - 1] < open) open -= histogram[--bin];
  return bin - 1;
}

// 0 < open < number of candidates.
Cut find_cut(const SelectArgs& args, int64_t open) {
  uint32_t histogram[2048 + 1] = {};  // the last one takes what is no candidate
  for (int64_t j = 0; j < args.length; ++j)
    ++histogram[args.fates[j] == kCandidate ? args.keys[j] >> kShift[0] : kBins[0]];
  uint32_t prefix = cut_bin(histogram, kBins[0], open);

  int64_t left = 0;  // keys that share the prefix
  for (int64_t j = 0; j < args.length; ++j) {
    args.narrow[left] = args.keys[j];
    left += (args.fates[j] == kCandidate) & (args.keys[j] >> kShift[0] == prefix);
  }
  for (int digit = 1; digit < kDigits; ++digit) {
    const int shift = kShift[digit];
    const uint32_t mask = kBins[digit] - 1;
    memset(histogram, 0, sizeof histogram);
    for (int64_t i = 0; i < left; ++i) ++histogram[args.narrow[i] >> shift & mask];
    const uint32_t bin = cut_bin(histogram, kBins[digit], open);
    int64_t same = 0;
    for (int64_t i = 0; i < left; ++i) {
      const uint32_t key = args.narrow[i];
      args.narrow[same] = key;
      same += (key >> shift & mask) == bin;
    }
    left = same;
    prefix = prefix * kBins[digit] + bin;
  }
  return {prefix, open};
}

// Writes the tokens that stay, in order, as far as there is room; returns their number.
int64_t write_keep(const SelectArgs& args, Cut cut, int64_t* keep) {
  int64_t kept = 0, ties = cut.ties;
  for (int64_t j = 0; j < args.length; ++j) {
    const bool candidate = args.fates[j] == kCandidate, tie = candidate & (args.keys[j] == cut.key);
    const bool stays = (args.fates[j] == kStays) | (candidate & (args.keys[j] > cut.key)) | (tie & (ties > 0));
    ties -= tie;
    if (kept < args.capacity) keep[kept] = j;
    kept += stays;
  }
  for (int64_t i = kept; i < args.capacity; ++i) keep[i] = -1;
  return kept;
}

template <class T>
void select_row(const SelectArgs& args, int64_t b) {
  const T* score = static_cast<const T*>(args.score) + b * args.score_stride;
  const uint8_t* types = args.types + b * args.types_stride;
  const uint8_t* keeps = args.keeps ? args.keeps + b * args.keeps_stride : nullptr;
  int64_t candidates, open;
  if (args.rule == Rule::topk) {
    int64_t safe;
    candidates = topk_fates(types, keeps, args.length, args.fates, safe);
    int64_t budget = args.budgets ? args.budgets[b * args.budgets_stride] : args.k;
    budget = (budget < 0 ? 0 : budget) - safe;
    open = budget < 0 ? 0 : budget < candidates ? budget : candidates;
  } else {
    const T* peak = static_cast<const T*>(args.peak) + b * args.peak_stride;
    const float limit = args.global_threshold * sum(score, args.length);
    candidates = dual_fates(score, peak, types, keeps, args.length, limit, args.individual_threshold, args.fates);
    open = 0;
  }
  open += (candidates - open) % args.drop_multiple;  // the best of those that would go are spared

  make_keys(score, args.length, args.keys);
  Cut cut{0xffffffffu, 0};                         // above every key: no candidate stays
  if (open == candidates) cut = {0, args.length};  // every candidate stays
  if (open > 0 && open < candidates) cut = find_cut(args, open);
  args.counts[b] = static_cast<int32_t>(write_keep(args, cut, args.keep + b * args.capacity));
}

}  // namespace

void select_tokens(const SelectArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    switch (args.element) {
      case Element::f32:
        select_row<float>(args, b);
        break;
      case Element::f16:
        select_row<half>(args, b);
        break;
      case Element::bf16:
        select_row<bfloat16>(args, b);
        break;
    }
  }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
