// SPDX-License-Identifier: Apache-2.0
// Which tokens stay. A selection is a set of candidates of which the best `open` stay, by order_key and then by index; the
// key that divides them is found by radix selection in the range that a sample suggests, so nothing is sorted and every
// input, also one whose scores are all equal, costs the same few passes. Flags are bytes, so that the passes vectorise.
#include "select/cpu_kernel.h"

#include "common/order.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

enum Fate : uint8_t { kGone = 0, kStays = 1, kCandidate = 2 };
constexpr uint8_t kPadding = 0, kVision = 2;  // token types

// Protected candidates stay; returns how many of the candidates are left.
int64_t protect(const uint8_t* keeps, int64_t length, int64_t candidates, uint8_t* fates) {
  if (!keeps) return candidates;
  int64_t left = 0;
  for (int64_t j = 0; j < length; ++j) {
    const uint8_t fate = (fates[j] == kCandidate) & (keeps[j] != 0) ? static_cast<uint8_t>(kStays) : fates[j];
    fates[j] = fate;
    left += fate == kCandidate;
  }
  return left;
}

// Candidates are the vision tokens; returns their number.
int64_t topk_fates(const uint8_t* types, int64_t length, uint8_t* fates) {
  int64_t vision = 0;
  for (int64_t j = 0; j < length; ++j) {
    fates[j] = types[j] == kPadding ? kGone : types[j] == kVision ? kCandidate : kStays;
    vision += types[j] == kVision;
  }
  return vision;
}

// The same bits on every machine: sixteen running sums, added pairwise at the end.
template <class T>
float sum(const T* value, int64_t length) {
  constexpr int kSums = 16;
  float lane[kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= length; j += kSums)
    for (int l = 0; l < kSums; ++l) lane[l] += to_float(value[j + l]);
  for (int l = 0; j + l < length; ++l) lane[l] += to_float(value[j + l]);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// Candidates are the vision tokens that are below both thresholds; returns their number.
template <class T>
int64_t dual_fates(const T* total, const T* peak, const uint8_t* types, int64_t length, float total_limit,
                   float peak_limit, uint8_t* fates) {
  int64_t candidates = 0;
  for (int64_t j = 0; j < length; ++j) {
    const bool low = (to_float(total[j]) < total_limit) & (to_float(peak[j]) < peak_limit);
    const bool drop = low & (types[j] == kVision);
    fates[j] = types[j] == kPadding ? kGone : drop ? kCandidate : kStays;
    candidates += drop;
  }
  return candidates;
}

// 0 where the token is no candidate, as for NaN.
template <class T>
void make_keys(const T* score, const uint8_t* fates, int64_t length, uint32_t* keys) {
  for (int64_t j = 0; j < length; ++j) {
    const uint32_t key = order_key(score[j]);  // of every token: a load that depends on the fate would not vectorise
    keys[j] = fates[j] == kCandidate ? key : 0u;
  }
}

// Bit i: flag i of 64.
uint64_t mask_of(const uint8_t* flags) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(flags);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
  uint64_t mask = 0;
  for (int part = 0; part < 8; ++part) {
    uint64_t bytes;
    memcpy(&bytes, flags + 8 * part, sizeof bytes);
    mask |= bytes * 0x0102040810204080u >> 56 << 8 * part;  // the lowest bits of eight bytes, side by side
  }
  return mask;
#endif
}

void clear_past(uint8_t* flags, int64_t length) { memset(flags + length, 0, (length + 63) / 64 * 64 - length); }

// What divides the candidates: those above `key` stay, and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// Keys from `lowest` to `highest`: all that share the leading bits of both.
struct Range {
  uint32_t lowest, highest;
};

// Divides the range into bins and returns those that hold its least-th to its most-th highest key; these ranks become ranks
// in what is returned. Keys outside of the range are not counted.
Range around(const uint32_t* keys, int64_t count, Range range, int64_t& least, int64_t& most) {
  constexpr int kBits = 8;
  constexpr uint32_t kBins = 1u << kBits;
  constexpr int kCopies = 2;  // of the counters: equal keys in a row do not wait for each other
  const int bits = range.lowest == range.highest ? 0 : 32 - __builtin_clz(range.lowest ^ range.highest);
  const int shift = bits > kBits ? bits - kBits : 0;
  const uint32_t first = range.lowest >> shift;
  uint32_t counters[kCopies][kBins + 1] = {};  // the last one for what is outside
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bin = (keys[i] >> shift) - first;
    ++counters[i % kCopies][bin < kBins ? bin : kBins];
  }
  const auto number = [&](uint32_t bin) { return static_cast<int64_t>(counters[0][bin]) + counters[1][bin]; };
  uint32_t bin = (range.highest >> shift) - first;
  int64_t above = 0;
  for (; bin > 0 && above + number(bin) < least; --bin) above += number(bin);
  const uint32_t highest = (first + bin) << shift | ((1u << shift) - 1);
  int64_t seen = above;
  for (; bin > 0 && seen + number(bin) < most; --bin) seen += number(bin);
  least -= above;
  most -= above;
  return {(first + bin) << shift, highest};
}

// Copies the keys in the range in order and returns their number; `above` becomes the number of those above it. `to` has
// room for `count` keys, up to a multiple of 16, and may be `from`.
int64_t keep_inside(const uint32_t* from, int64_t count, Range range, uint32_t* to, int64_t& above) {
  int64_t left = 0, higher = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi32(range.lowest), high = _mm512_set1_epi32(range.highest);
  for (; i + 16 <= count; i += 16) {
    const __m512i key = _mm512_loadu_si512(from + i);
    const __mmask16 over = _mm512_cmpgt_epu32_mask(key, high);
    const __mmask16 inside = _mm512_cmpge_epu32_mask(key, low) & ~over;
    _mm512_storeu_si512(to + left, _mm512_maskz_compress_epi32(inside, key));
    left += __builtin_popcount(inside);
    higher += __builtin_popcount(over);
  }
#else
  for (; i + 64 <= count; i += 64) {
    uint8_t inside[64];
    uint32_t over = 0;
    for (int l = 0; l < 64; ++l) {
      inside[l] = (from[i + l] >= range.lowest) & (from[i + l] <= range.highest);
      over += from[i + l] > range.highest;
    }
    higher += over;
    for (uint64_t mask = mask_of(inside); mask; mask &= mask - 1) to[left++] = from[i + __builtin_ctzll(mask)];
  }
#endif
  for (; i < count; ++i) {
    const uint32_t key = from[i];
    to[left] = key;
    left += (key >= range.lowest) & (key <= range.highest);
    higher += key > range.highest;
  }
  above = higher;
  return left;
}

constexpr Range kAllKeys = {0, ~0u};

// Where the open-th highest key should be, by a sample of the keys, which is left in `scratch`.
Range expected_range(const uint32_t* keys, int64_t length, int64_t open, uint32_t* scratch) {
  constexpr int64_t kStep = 16;
  int64_t count = 0;
  for (int64_t j = 0; j < length; j += kStep) scratch[count++] = keys[j];
  const float rank = static_cast<float>(open) / kStep, margin = 4 * __builtin_sqrtf(rank) + 8;  // four deviations
  auto least = static_cast<int64_t>(rank - margin), most = static_cast<int64_t>(rank + margin);
  const Range coarse = around(scratch, count, kAllKeys, least, most);
  return around(scratch, count, coarse, least, most);
}

// 0 < open < number of candidates. `narrow` is overwritten. One pass over the keys says whether the sample was right;
// where it was not, all keys are looked at again.
Cut find_cut(const uint32_t* keys, int64_t length, int64_t open, uint32_t* narrow) {
  constexpr int64_t kFewKeys = 1024;  // are not worth a sample
  Range range = length <= kFewKeys ? kAllKeys : expected_range(keys, length, open, narrow);
  int64_t above, left = keep_inside(keys, length, range, narrow, above);
  if (open <= above || open > above + left) {
    range = kAllKeys;
    left = keep_inside(keys, length, range, narrow, above);
  }
  open -= above;
  while (range.lowest != range.highest) {
    int64_t same = open;
    range = around(narrow, left, range, open, same);
    left = keep_inside(narrow, left, range, narrow, above);
  }
  const uint32_t key = range.lowest;
  return key > 0 && open == left ? Cut{key - 1, 0} : Cut{key, open};  // 0: of NaN, and of those that are no candidates
}

// Lets the first candidates that tie with the cut stay.
void keep_ties(const uint32_t* keys, int64_t length, Cut cut, const uint8_t* fates, uint8_t* flags) {
  int64_t ties = cut.ties;
  for (int64_t base = 0; base < length && ties > 0; base += 64) {
    const int64_t end = base + 64 < length ? base + 64 : length;
    uint32_t any = 0;
    for (int64_t j = base; j < end; ++j) any |= keys[j] == cut.key;
    for (int64_t j = base; any && j < end && ties > 0; ++j) {
      const bool tie = fates[j] == kCandidate && keys[j] == cut.key;
      flags[j] |= tie;
      ties -= tie;
    }
  }
}

// flags[j] = rule(j). The flags stand in a pointer of their own: seen through SelectArgs, a store of bytes might change it.
template <class Rule>
void flag(uint8_t* flags, int64_t length, const Rule& rule) {
  for (int64_t j = 0; j < length; ++j) flags[j] = rule(j);
}

// Flags the tokens that stay.
template <class T>
void decide(const SelectArgs& args, const T* score, int64_t candidates, int64_t open) {
  const int64_t length = args.length;
  const uint8_t* const fates = args.fates;
  if (open == 0) {
    flag(args.flags, length, [fates](int64_t j) { return fates[j] == kStays; });
  } else if (open == candidates) {
    flag(args.flags, length, [fates](int64_t j) { return fates[j] != kGone; });
  } else {
    const uint32_t* const keys = args.keys;
    make_keys(score, fates, length, args.keys);
    const Cut cut = find_cut(keys, length, open, args.narrow);
    flag(args.flags, length, [=](int64_t j) { return (fates[j] == kStays) | (keys[j] > cut.key); });
    keep_ties(keys, length, cut, fates, args.flags);
  }
  clear_past(args.flags, length);
}

constexpr int kFewBits = 12;  // of 64, that are written faster one by one

// Writes base + i for each set bit i of the mask, in order, 64 numbers at most; returns where the next one goes. The rest of
// the 64 places may be overwritten.
int64_t* write_set(uint64_t mask, int64_t base, int64_t* to) {
#if defined(__AVX512F__)
  const __m512i step = _mm512_set1_epi64(8);
  __m512i index = _mm512_add_epi64(_mm512_set1_epi64(base), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  for (int part = 0; part < 8; ++part, mask >>= 8, index = _mm512_add_epi64(index, step)) {
    const auto eight = static_cast<__mmask8>(mask);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(eight, index));
    to += __builtin_popcount(eight);
  }
#else
  for (; mask; mask &= mask - 1) *to++ = base + __builtin_ctzll(mask);
#endif
  return to;
}

// Writes the flagged tokens in order, as far as there is room; returns their number. Flags go on with zeros to a multiple
// of 64.
int64_t write_keep(const uint8_t* flags, int64_t length, int64_t* keep, int64_t capacity) {
  int64_t number = 0;
  int64_t *next = keep, *const end = keep + capacity;
  for (int64_t base = 0; base < length; base += 64) {
    uint64_t mask = mask_of(flags + base);
    const int bits = __builtin_popcountll(mask);
    number += bits;
    if (bits > kFewBits && end - next >= 64)
      next = write_set(mask, base, next);
    else
      for (; mask && next < end; mask &= mask - 1) *next++ = base + __builtin_ctzll(mask);
  }
  if (next < end) memset(next, 0xff, (end - next) * sizeof *next);  // -1; an empty result has no address
  return number;
}

template <class T>
void select_row(const SelectArgs& args, int64_t b) {
  const T* score = static_cast<const T*>(args.score) + b * args.score_stride;
  const uint8_t* types = args.types + b * args.types_stride;
  const uint8_t* keeps = args.keeps ? args.keeps + b * args.keeps_stride : nullptr;
  int64_t candidates, open = 0;
  if (args.rule == Rule::topk) {
    const int64_t vision = topk_fates(types, args.length, args.fates);
    candidates = protect(keeps, args.length, vision, args.fates);
    int64_t budget = args.budgets ? args.budgets[b * args.budgets_stride] : args.k;
    budget = (budget < 0 ? 0 : budget) - (vision - candidates);  // the protected come first
    open = budget < 0 ? 0 : budget < candidates ? budget : candidates;
  } else {
    const T* peak = static_cast<const T*>(args.peak) + b * args.peak_stride;
    const float limit = args.global_threshold * sum(score, args.length);
    candidates = dual_fates(score, peak, types, args.length, limit, args.individual_threshold, args.fates);
    candidates = protect(keeps, args.length, candidates, args.fates);
  }
  open += (candidates - open) % args.drop_multiple;  // the best of those that would go are spared
  decide(args, score, candidates, open);
  args.counts[b] =
      static_cast<int32_t>(write_keep(args.flags, args.length, args.keep + b * args.capacity, args.capacity));
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
