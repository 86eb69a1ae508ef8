// SPDX-License-Identifier: Apache-2.0
// gather_tokens on the CPU: out[b, i] = x[b, keep[b, i]] for i < counts[b], zero elsewhere. Copies bytes of any dtype;
// adjacent kept tokens are copied together.
#include <cstring>

#include "common/workers.h"
#include "gather/checks.h"

namespace mustdrop {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // least work of a thread

// Layout of a token x[b, l]: its trailing dimensions, of which the last `run` bytes are contiguous.
struct TokenLayout {
  std::vector<int64_t> sizes;    // outer trailing dimensions; none if the token is contiguous
  std::vector<int64_t> strides;  // theirs, in bytes
  int64_t run;
  int64_t bytes;  // of a token in the result
};

TokenLayout describe_token(const Tensor& x) {
  const int64_t element = static_cast<int64_t>(x.element_size());
  TokenLayout token{{}, {}, element, element};
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

struct GatherParameters {
  TokenLayout token;
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

// Copies one token with gaps, from its dimension d on; returns the end of the copy.
char* copy_token(const TokenLayout& token, size_t d, const char* from, char* to) {
  if (d == token.sizes.size()) {
    std::memcpy(to, from, token.run);
    return to + token.run;
  }
  for (int64_t i = 0; i < token.sizes[d]; ++i) to = copy_token(token, d + 1, from + i * token.strides[d], to);
  return to;
}

// Copies the tokens of entries [begin, end) to `to`, for contiguous tokens.
void copy_runs(const GatherParameters& p, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  const int64_t bytes = p.token.bytes;
  const bool together = p.row_stride == bytes;
  for (int64_t i = begin; i < end;) {
    const int64_t index = keep[i];
    int64_t n = 1;
    if (index < 0 || index >= p.length) {
      std::memset(to, 0, bytes);
    } else {
      if (together) {
        const int64_t most = std::min(end - i, p.length - index);
        while (n < most && keep[i + n] == index + n) ++n;
      }
      std::memcpy(to, x + index * p.row_stride, n * bytes);
    }
    i += n;
    to += n * bytes;
  }
}

// copy_runs for tokens of one small element: position ids, token types, masks.
template <class Element>
void copy_elements(const GatherParameters& p, const char* x, const int64_t* keep, int64_t begin, int64_t end,
                   char* to) {
  for (int64_t i = begin; i < end; ++i, to += sizeof(Element)) {
    Element value{};
    if (keep[i] >= 0 && keep[i] < p.length) std::memcpy(&value, x + keep[i] * p.row_stride, sizeof value);
    std::memcpy(to, &value, sizeof value);
  }
}

void copy_tokens_with_gaps(const GatherParameters& p, const char* x, const int64_t* keep, int64_t begin, int64_t end,
                           char* to) {
  for (int64_t i = begin; i < end; ++i, to += p.token.bytes) {
    if (keep[i] < 0 || keep[i] >= p.length) {
      std::memset(to, 0, p.token.bytes);
    } else {
      copy_token(p.token, 0, x + keep[i] * p.row_stride, to);
    }
  }
}

void copy_entries(const GatherParameters& p, const char* x, const int64_t* keep, int64_t begin, int64_t end, char* to) {
  if (!p.token.sizes.empty()) return copy_tokens_with_gaps(p, x, keep, begin, end, to);
  switch (p.token.bytes) {
    case 1:
      return copy_elements<uint8_t>(p, x, keep, begin, end, to);
    case 2:
      return copy_elements<uint16_t>(p, x, keep, begin, end, to);
    case 4:
      return copy_elements<uint32_t>(p, x, keep, begin, end, to);
    case 8:
      return copy_elements<uint64_t>(p, x, keep, begin, end, to);
    default:
      return copy_runs(p, x, keep, begin, end, to);
  }
}

// Writes slots [begin, end) of sequence b: zeros, then its tokens, then zeros.
void fill_slots(const GatherParameters& p, int64_t b, int64_t begin, int64_t end) {
  const int64_t kept = std::clamp<int64_t>(p.counts[b * p.counts_stride], 0, p.capacity);
  const int64_t shift = p.align_end ? p.capacity - kept : 0;  // the slot of entry 0
  const int64_t first = std::clamp(shift, begin, end), last = std::clamp(shift + kept, begin, end);
  char* row = p.out + b * p.capacity * p.token.bytes;
  std::memset(row + begin * p.token.bytes, 0, (first - begin) * p.token.bytes);
  copy_entries(p, p.x + b * p.batch_stride, p.keep + b * p.keep_stride, first - shift, last - shift,
               row + first * p.token.bytes);
  std::memset(row + last * p.token.bytes, 0, (end - last) * p.token.bytes);
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
  if (x.numel() == 0) return new_zeros(x, shape, x.scalar_type());  // x has no elements and no address

  const GatherParameters p{describe_token(x),
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
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / p.token.bytes);
  torch::stable::parallel_for(0, slots, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // sequence by sequence
      const int64_t b = begin / capacity, last = std::min(end, (b + 1) * capacity);
      fill_slots(p, b, begin - b * capacity, last - b * capacity);
      begin = last;
    }
  });
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, CPU, m) { m.impl("gather_tokens", TORCH_BOX(&mustdrop::gather_tokens)); }
