// SPDX-License-Identifier: Apache-2.0
// Selects the tokens that stay: all that are no candidates, and the best `open` candidates, by order_key and then by
// index. Radix selection in a range estimated from a sample finds the dividing key, so nothing is sorted and every
// input, even one of equal scores, takes the same few passes. Passes iterate over chunks and recompute a chunk's fates,
// keys and flags, which is cheaper than loading them. All are arrays, so loops vectorize.
#include "select/cpu_kernel.h"

#include "common/order.h"
#include "common/token_types.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

enum Fate : uint8_t { kGone = 0, kStays = 1, kCandidate = 2 };
constexpr int64_t kChunk = 1024;  // tokens
constexpr int64_t kSampleStep = 16;

// Equal bits on every machine: sixteen running sums, added pairwise at the end.
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

// One sequence.
template <class T>
struct Row {
  const T* scores;
  const T* peak;  // dual
  const uint8_t* token_types;
  const uint8_t* protected_tokens;  // or null
  int64_t length;
  bool dual;
  float score_limit, peak_limit;  // dual
};

// Fates of a chunk's tokens before their keys are compared. Candidates are the unprotected vision tokens; in the dual
// rule those below both thresholds.
struct Fates {
  uint8_t of[kChunk];
  int64_t candidates, spared;  // vision tokens: unprotected, protected
};

template <class T>
void find_fates(const Row<T>& row, int64_t begin, int64_t count, Fates& fates) {
  const uint8_t* const types = row.token_types + begin;
  uint8_t* const of = fates.of;
  uint32_t candidates = 0, left = 0;
  if (row.dual) {
    const T *const score = row.scores + begin, *const peak = row.peak + begin;
    const float score_limit = row.score_limit, peak_limit = row.peak_limit;
    for (int64_t j = 0; j < count; ++j) {
      const bool low = (to_float(score[j]) < score_limit) & (to_float(peak[j]) < peak_limit);
      const bool drop = low & (types[j] == kVisionToken);
      of[j] = types[j] == kPaddingToken ? kGone : drop ? kCandidate : kStays;
      candidates += drop;
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      of[j] = types[j] == kPaddingToken ? kGone : types[j] == kVisionToken ? kCandidate : kStays;
      candidates += types[j] == kVisionToken;
    }
  }
  if (row.protected_tokens) {
    const uint8_t* const is_protected = row.protected_tokens + begin;
    for (int64_t j = 0; j < count; ++j) {
      of[j] = (of[j] == kCandidate) & (is_protected[j] != 0) ? static_cast<uint8_t>(kStays) : of[j];
      left += of[j] == kCandidate;
    }
  } else {
    left = candidates;
  }
  fates.candidates = left;
  fates.spared = candidates - left;
}

// Keys of a chunk; 0 if the token is no candidate, as for NaN.
template <class T>
void make_keys(const Row<T>& row, int64_t begin, int64_t count, const uint8_t* fates, uint32_t* keys) {
  const T* const score = row.scores + begin;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t key = order_key(score[j]);  // of every token: a load that depends on the fate would not vectorize
    keys[j] = fates[j] == kCandidate ? key : 0u;
  }
}

// Calls visit(begin, count, fates) for each chunk.
template <class T, class Visit>
void for_each_chunk(const Row<T>& row, const Visit& visit) {
  Fates fates;
  for (int64_t begin = 0; begin < row.length; begin += kChunk) {
    const int64_t count = row.length - begin < kChunk ? row.length - begin : kChunk;
    find_fates(row, begin, count, fates);
    visit(begin, count, fates);
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
    mask |= bytes * 0x0102040810204080u >> 56 << 8 * part;  // gathers the lowest bits of eight bytes
  }
  return mask;
#endif
}

void clear_past(uint8_t* flags, int64_t length) { memset(flags + length, 0, (length + 63) / 64 * 64 - length); }

// Division of the candidates: those above `key` stay, and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// Keys from `lowest` to `highest`: all with the leading bits that both share.
struct Range {
  uint32_t lowest, highest;
};

// Divides the range into bins and returns the bins of its least-th to its most-th highest key; these ranks become ranks
// in the returned range. Keys outside the range are not counted.
Range around(const uint32_t* keys, int64_t count, Range range, int64_t& least, int64_t& most) {
  constexpr int kBits = 8;
  constexpr uint32_t kBins = 1u << kBits;
  constexpr int kCopies = 4;  // of the counters, so that successive equal keys do not depend on each other
  const int bits = range.lowest == range.highest ? 0 : 32 - __builtin_clz(range.lowest ^ range.highest);
  const int shift = bits > kBits ? bits - kBits : 0;
  const uint32_t first = range.lowest >> shift;
  uint32_t counters[kCopies][kBins + 1] = {};  // the last one for keys outside
  const auto count_key = [&](int64_t i, int copy) {
    const uint32_t bin = (keys[i] >> shift) - first;
    ++counters[copy][bin < kBins ? bin : kBins];
  };
  int64_t i = 0;
  for (; i + kCopies <= count; i += kCopies)
#pragma GCC unroll 4
    for (int copy = 0; copy < kCopies; ++copy) count_key(i + copy, copy);
  for (; i < count; ++i) count_key(i, 0);
  const auto number = [&](uint32_t bin) {
    return static_cast<int64_t>(counters[0][bin] + counters[1][bin]) + (counters[2][bin] + counters[3][bin]);
  };
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

// Copies the keys in the range in order and returns their number; sets `above` to the number of keys above it. `to` has
// room for `count` keys, rounded up to a multiple of 16, and may be `from`.
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

// Estimates the range of the open-th highest key from a sample of the keys.
Range expected_range(const uint32_t* sample, int64_t count, int64_t open) {
  const float rank = static_cast<float>(open) / kSampleStep;
  const float margin = 4 * __builtin_sqrtf(rank) + 8;  // four standard deviations
  auto least = static_cast<int64_t>(rank - margin), most = static_cast<int64_t>(rank + margin);
  const Range coarse = around(sample, count, kAllKeys, least, most);
  return around(sample, count, coarse, least, most);
}

// 0 < open < number of candidates. `candidate_keys` begins with a sample of the keys and is overwritten. One pass over
// the keys verifies the estimated range; if it is wrong, a second pass collects all keys.
template <class T>
Cut find_cut(const Row<T>& row, int64_t open, uint32_t* candidate_keys) {
  const int64_t sampled = (row.length + kSampleStep - 1) / kSampleStep;
  Range range = row.length <= kChunk ? kAllKeys : expected_range(candidate_keys, sampled, open);
  int64_t above = 0, left = 0;
  const auto collect = [&] {
    above = left = 0;
    for_each_chunk(row, [&](int64_t begin, int64_t count, const Fates& fates) {
      alignas(64) uint32_t keys[kChunk];
      make_keys(row, begin, count, fates.of, keys);
      int64_t higher;
      left += keep_inside(keys, count, range, candidate_keys + left, higher);
      above += higher;
    });
  };
  collect();
  if (open <= above || open > above + left) {
    range = kAllKeys;
    collect();
  }
  open -= above;
  while (range.lowest != range.highest) {
    int64_t same = open;
    range = around(candidate_keys, left, range, open, same);
    left = keep_inside(candidate_keys, left, range, candidate_keys, above);
  }
  const uint32_t key = range.lowest;
  // Key 0 is that of NaN, and of tokens that are no candidates.
  return key > 0 && open == left ? Cut{key - 1, 0} : Cut{key, open};
}

// Lets the first candidates that equal the cut stay; returns how many more may.
int64_t keep_ties(const uint32_t* keys, int64_t count, Cut cut, const uint8_t* fates, uint8_t* flags) {
  int64_t ties = cut.ties;
  for (int64_t base = 0; base < count && ties > 0; base += 64) {
    const int64_t end = base + 64 < count ? base + 64 : count;
    uint32_t any = 0;
    for (int64_t j = base; j < end; ++j) any |= keys[j] == cut.key;
    for (int64_t j = base; any && j < end && ties > 0; ++j) {
      const bool tie = fates[j] == kCandidate && keys[j] == cut.key;
      flags[j] |= tie;
      ties -= tie;
    }
  }
  return ties;
}

constexpr int kFewBits = 12;  // of 64: so few are faster to write one by one

// Writes base + i for each set bit i of the mask, in order; returns the end. May overwrite all of the 64 elements.
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

// Writes the positions that stay, in order, up to the capacity.
class Kept {
 public:
  Kept(int64_t* keep, int64_t capacity) : next_(keep), end_(keep + capacity) {}

  // `flags`: of the tokens from `begin` on, with zeros up to a multiple of 64.
  void add(int64_t begin, int64_t count, const uint8_t* flags) {
    for (int64_t base = 0; base < count; base += 64) {
      uint64_t mask = mask_of(flags + base);
      const int bits = __builtin_popcountll(mask);
      number_ += bits;
      if (bits > kFewBits && end_ - next_ >= 64)
        next_ = write_set(mask, begin + base, next_);
      else
        for (; mask && next_ < end_; mask &= mask - 1) *next_++ = begin + base + __builtin_ctzll(mask);
    }
  }

  // Fills the rest with -1; returns the number of tokens that stay.
  int64_t finish() {
    if (next_ < end_) memset(next_, 0xff, (end_ - next_) * sizeof *next_);  // -1; an empty result has no address
    return number_;
  }

 private:
  int64_t *next_, *end_;
  int64_t number_ = 0;
};

// Writes the tokens that stay and returns their number.
template <class T>
int64_t write_kept(const SelectParameters& p, const Row<T>& row, int64_t b, int64_t candidates, int64_t open) {
  Kept kept(p.keep + b * p.capacity, p.capacity);
  const bool none = open == 0, all = open == candidates;
  Cut cut = none || all ? Cut{} : find_cut(row, open, p.candidate_keys);
  for_each_chunk(row, [&](int64_t begin, int64_t count, const Fates& fates) {
    const uint8_t* const of = fates.of;
    alignas(64) uint8_t flags[kChunk];
    if (none) {
      for (int64_t j = 0; j < count; ++j) flags[j] = of[j] == kStays;
    } else if (all) {
      for (int64_t j = 0; j < count; ++j) flags[j] = of[j] != kGone;
    } else {
      alignas(64) uint32_t keys[kChunk];
      make_keys(row, begin, count, of, keys);
      for (int64_t j = 0; j < count; ++j) flags[j] = (of[j] == kStays) | (keys[j] > cut.key);
      cut.ties = keep_ties(keys, count, cut, of, flags);
    }
    clear_past(flags, count);
    kept.add(begin, count, flags);
  });
  return kept.finish();
}

// Counts the candidates and the protected tokens; writes a sample of the candidates' keys.
template <class T>
void count_candidates(const Row<T>& row, uint32_t* sample, int64_t& candidates, int64_t& spared) {
  for_each_chunk(row, [&](int64_t begin, int64_t count, const Fates& fates) {
    candidates += fates.candidates;
    spared += fates.spared;
    for (int64_t j = 0; j < count; j += kSampleStep)
      *sample++ = fates.of[j] == kCandidate ? order_key(row.scores[begin + j]) : 0u;
  });
}

template <class T>
void select_row(const SelectParameters& p, int64_t b) {
  Row<T> row{};
  row.scores = static_cast<const T*>(p.scores) + b * p.score_stride;
  row.token_types = p.token_types + b * p.type_stride;
  row.protected_tokens = p.protected_tokens ? p.protected_tokens + b * p.protected_stride : nullptr;
  row.length = p.length;
  row.dual = p.rule == Rule::dual;
  if (row.dual) {
    row.peak = static_cast<const T*>(p.peak) + b * p.peak_stride;
    row.score_limit = p.global_threshold * sum(row.scores, row.length);
    row.peak_limit = p.individual_threshold;
  }
  int64_t candidates = 0, spared = 0, open = 0;
  if (!row.dual || p.drop_multiple > 1) count_candidates(row, p.candidate_keys, candidates, spared);
  if (!row.dual) {
    const int64_t budget = p.budgets ? p.budgets[b * p.budget_stride] : p.k;
    open = (budget < 0 ? 0 : budget) - spared;  // protected tokens count first
    open = open < 0 ? 0 : open < candidates ? open : candidates;
  }
  open += (candidates - open) % p.drop_multiple;  // the best of the tokens to drop stay
  p.counts[b] = static_cast<int32_t>(write_kept(p, row, b, candidates, open));
}

}  // namespace

void select_tokens(const SelectParameters& p, int64_t begin, int64_t end) {
  with_element(p.element, [&](auto type) {
    for (int64_t b = begin; b < end; ++b) select_row<decltype(type)>(p, b);
  });
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
