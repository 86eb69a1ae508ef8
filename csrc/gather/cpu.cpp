// SPDX-License-Identifier: Apache-2.0
// gather_tokens on the CPU: out[b, i] = x[b, keep[b, i]] for i < counts[b], zero elsewhere. It moves bytes, whatever they
// mean; neighbours that are kept together are copied together.
#include <cstring>

#include "common/workers.h"
#include "gather/checks.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // least work of a thread

// A token of x, x[b, l]: its trailing dimensions, of which the last `run` bytes lie together.
struct Token {
  std::vector<int64_t> sizes;    // outer trailing dimensions; none where the whole token lies together
  std::vector<int64_t> strides;  // theirs, in bytes
  int64_t run;
  int64_t bytes;  // of the whole token in the result
};

Token describe_token(const Tensor& x) {
  const int64_t element = static_cast<int64_t>(x.element_size());
  Token token{{}, {}, element, element};
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t size = x.size(d), stride = x.stride(d) * element;
    token.bytes *= size;
    if (size == 1) continue;
    if (token.sizes.empty() && stride == token.run) {
      token.run *= size;
    } else {
      token.sizes.insert(token.sizes.begin(), size);
      token.strides.insert(token.strides.begin(), stride);
    }
  }
  return token;
}

struct Gather {
  Token token;
  const char* x;         // [B, L, ...]
  int64_t batch_stride;  // of x, in bytes
  int64_t row_stride;
  int64_t length;         // L
  const int64_t* keep;    // [B, K]
  int64_t keep_stride;    // of its rows
  const int32_t* counts;  // [B]
  int64_t counts_stride;
  char* out;  // [B, K, ...]
  int64_t capacity;
  bool align_end;
};

// One token with gaps, from its dimension d on; returns where the next one goes.
char* copy_token(const Token& token, size_t d, const char* from, char* to) {
  if (d == token.sizes.size()) {
    std::memcpy(to, from, token.run);
    return to + token.run;
  }
  for (int64_t i = 0; i < token.sizes[d]; ++i) to = copy_token(token, d + 1, from + i * token.strides[d], to);
  return to;
}

// The tokens of entries [begin, end) to `to`, for tokens without gaps.
void copy_runs(const Gather& g, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  const int64_t bytes = g.token.bytes;
  const bool together = g.row_stride == bytes;
  for (int64_t i = begin; i < end;) {
    const int64_t index = keep[i];
    int64_t n = 1;
    if (index < 0 || index >= g.length) {
      std::memset(to, 0, bytes);
    } else {
      if (together) {
        const int64_t most = std::min(end - i, g.length - index);
        while (n < most && keep[i + n] == index + n) ++n;
      }
      std::memcpy(to, x + index * g.row_stride, n * bytes);
    }
    i += n;
    to += n * bytes;
  }
}

// The same for tokens of one small element: position ids, token types, masks.
template <class Element>
void copy_elements(const Gather& g, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  for (int64_t i = begin; i < end; ++i, to += sizeof(Element)) {
    Element value{};
    if (keep[i] >= 0 && keep[i] < g.length) std::memcpy(&value, x + keep[i] * g.row_stride, sizeof value);
    std::memcpy(to, &value, sizeof value);
  }
}

void copy_tokens_with_gaps(const Gather& g, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  for (int64_t i = begin; i < end; ++i, to += g.token.bytes) {
    if (keep[i] < 0 || keep[i] >= g.length) {
      std::memset(to, 0, g.token.bytes);
    } else {
      copy_token(g.token, 0, x + keep[i] * g.row_stride, to);
    }
  }
}

void copy_entries(const Gather& g, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  if (!g.token.sizes.empty()) return copy_tokens_with_gaps(g, x, keep, begin, end, to);
  switch (g.token.bytes) {
    case 1:
      return copy_elements<uint8_t>(g, x, keep, begin, end, to);
    case 2:
      return copy_elements<uint16_t>(g, x, keep, begin, end, to);
    case 4:
      return copy_elements<uint32_t>(g, x, keep, begin, end, to);
    case 8:
      return copy_elements<uint64_t>(g, x, keep, begin, end, to);
    default:
      return copy_runs(g, x, keep, begin, end, to);
  }
}

// Slots [begin, end) of sequence b: zeros, then its tokens, then zeros.
void fill_slots(const Gather& g, int64_t b, int64_t begin, int64_t end) {
  const int64_t kept = std::clamp<int64_t>(g.counts[b * g.counts_stride], 0, g.capacity);
  const int64_t shift = g.align_end ? g.capacity - kept : 0;  // the slot of entry 0
  const int64_t first = std::clamp(shift, begin, end), last = std::clamp(shift + kept, begin, end);
  char* row = g.out + b * g.capacity * g.token.bytes;
  std::memset(row + begin * g.token.bytes, 0, (first - begin) * g.token.bytes);
  copy_entries(g, g.x + b * g.batch_stride, g.keep + b * g.keep_stride, first - shift, last - shift,
               row + first * g.token.bytes);
  std::memset(row + last * g.token.bytes, 0, (end - last) * g.token.bytes);
}

Tensor gather_tokens(const Tensor& x,       // [B, L, ...]
                     const Tensor& keep,    // [B, K]
                     const Tensor& counts,  // [B]
                     bool align_end) {
  check_gather_tokens(x, keep, counts);
  const int64_t batch = x.size(0), capacity = keep.size(1), element = static_cast<int64_t>(x.element_size());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = capacity;
  Tensor out = new_empty(x, shape, x.scalar_type());
  if (out.numel() == 0) return out;
  if (x.numel() == 0) return new_zeros(x, shape, x.scalar_type());  // nothing to take, and no address

  const Gather g{describe_token(x),
                 data<char>(x),
                 x.stride(0) * element,
                 x.stride(1) * element,
                 x.size(1),
                 data<int64_t>(keep),
                 keep.stride(0),
                 data<int32_t>(counts),
                 counts.stride(0),
                 mutable_data<char>(out),
                 capacity,
                 align_end};
  const int64_t slots = batch * capacity;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / g.token.bytes);
  torch::stable::parallel_for(0, slots, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // one sequence after the other
      const int64_t b = begin / capacity, last = std::min(end, (b + 1) * capacity);
      fill_slots(g, b, begin - b * capacity, last - b * capacity);
      begin = last;
    }
  });
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) { m.impl("gather_tokens", TORCH_BOX(&mustdrop::gather_tokens)); }
