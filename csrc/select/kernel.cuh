// SPDX-License-Identifier: Apache-2.0
// Selects the tokens that stay. Dual: a vision token j is dropped iff total[j] < global * sum(total) and peak[j] <
// individual and it is not protected. Top-k: the best max(0, k - protected) of the unprotected vision tokens stay. Then
// the best of the tokens to drop stay too, until the number of dropped ones is a multiple of `drop_multiple`. Output:
// ascending positions.
//
// Every token is mapped to a 32-bit key: 0 padding, 1 stays unconditionally, above that a candidate, ordered by score
// (NaN lowest, -0 = +0). Both rules then keep the `open` best candidates, ties to the lower index. A radix select
// (digits of 11, 11 and 10 bits, integer histograms in shared memory) finds the key of the last candidate that stays,
// and how many with that key do; no buffer of candidates can overflow. Scans write the positions in order.
//
// A block, or a cluster of blocks with a consecutive part each, processes a sequence.
#pragma once

#include "common/device.cuh"
#include "common/token_types.h"

namespace mustdrop {

constexpr int kSelectDigits = 2048;                 // buckets of a digit
constexpr int kSelectItems = 4;                     // consecutive tokens of a thread
constexpr uint32_t kKeyPadding = 0, kKeyStays = 1;  // below every ordered_key()

struct SelectParameters {
  const void* scores;            // [B, L]; total in the dual rule
  const void* peak;              // [B, L]; null: top-k
  const uint8_t* token_types;    // [B, L]
  const bool* protected_tokens;  // [B, L] or null
  const int32_t* budgets;        // [B] or null
  int64_t* keep;                 // [B, capacity]
  int32_t* counts;               // [B]
  int64_t length, capacity, k, drop_multiple;
  int64_t score_stride, peak_stride, type_stride, protected_stride, budget_stride;  // of a row
  int64_t part;                                                                     // tokens of a block
  float global_threshold, individual_threshold;
  bool cached;  // a block's keys fit into its shared memory
};

// A block's shared memory; the keys come last.
struct SelectShared {
  uint32_t histogram[kSelectDigits];
  uint64_t scan[2][kWarp];
  float sums[kWarp];
  uint64_t exchange;  // read by the other blocks of the cluster
  uint32_t bucket, above;
};

template <class T>
struct SelectRow {
  const T* scores;  // [L]
  const T* peak;    // [L] or null
  const uint8_t* types;
  const bool* protected_tokens;  // [L] or null
  float limit, individual;
};

template <class T>
__device__ __forceinline__ uint32_t select_key(const SelectRow<T>& row, int64_t j) {
  const uint8_t type = row.types[j];
  if (type == kPaddingToken) return kKeyPadding;
  if (type != kVisionToken || (row.protected_tokens && row.protected_tokens[j])) return kKeyStays;
  const float score = to_float(row.scores[j]);
  if (row.peak && !(score < row.limit && to_float(row.peak[j]) < row.individual)) return kKeyStays;
  return ordered_key(score);
}

// This block's tokens [begin, end), as keys.
template <class T>
struct SelectPart {
  SelectRow<T> row;
  const uint32_t* keys;  // in shared memory, or null
  int64_t begin, end;

  __device__ __forceinline__ uint32_t key(int64_t j) const { return keys ? keys[j - begin] : select_key(row, j); }
};

// Barrier of all threads of a sequence. A single block avoids the slower barrier of a cluster.
__device__ __forceinline__ void row_barrier() {
  if (cluster_size() == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
}

// Sum over the cluster of one value per block; equal in all threads.
template <class T>
__device__ __forceinline__ T cluster_total(T value, SelectShared& shared) {
  if (cluster_size() == 1) return value;
  T* mine = reinterpret_cast<T*>(&shared.exchange);
  if (threadIdx.x == 0) *mine = value;
  cluster_barrier();
  T total = T(0);
  for (unsigned rank = 0; rank < cluster_size(); ++rank) total += *cluster_shared(mine, rank);
  cluster_barrier();
  return total;
}

// sum(total) over the row, in an order that depends only on the shape.
template <class T>
__device__ __forceinline__ float row_sum(const SelectPart<T>& part, SelectShared& shared) {
  float sum = 0.0f;
  for (int64_t j = part.begin + threadIdx.x; j < part.end; j += blockDim.x) sum += to_float(part.row.scores[j]);
  return cluster_total(block_sum(sum, shared.sums), shared);
}

// Adds this block's candidates whose high bits are `prefix` to the histogram of the digit at `shift`.
template <class T>
__device__ __forceinline__ void count_digit(const SelectPart<T>& part, SelectShared& shared, uint64_t prefix, int bits,
                                            int shift) {
  for (int i = threadIdx.x; i < kSelectDigits; i += blockDim.x) shared.histogram[i] = 0;
  __syncthreads();
  for (int64_t first = part.begin; first < part.end; first += blockDim.x) {
    const int64_t j = first + threadIdx.x;
    const uint32_t key = j < part.end ? part.key(j) : 0;
    const bool counted = key > kKeyStays && (uint64_t(key) >> (shift + bits)) == prefix;
    const uint32_t digit = key >> shift & ((1u << bits) - 1);
    // Scores share their exponents: lanes with equal digits add once, else a few addresses would serialize the warp.
    const unsigned equal_lanes = __match_any_sync(kFullMask, counted ? digit : ~0u);
    if (counted && lane_id() == unsigned(__ffs(equal_lanes) - 1))
      atomicAdd(&shared.histogram[digit], uint32_t(__popc(equal_lanes)));
  }
}

// Finds the bucket of the `open`-th best candidate (open >= 1): shared.bucket; and the number above it: shared.above.
__device__ __forceinline__ void find_bucket(SelectShared& shared, uint32_t open) {
  row_barrier();                                                  // all histograms are complete
  const int each = kSelectDigits / static_cast<int>(blockDim.x);  // buckets of a thread, from the highest down
  uint32_t count[kSelectDigits / 256], mine = 0;
#pragma unroll
  for (int i = 0; i < kSelectDigits / 256; ++i) {
    count[i] = 0;
    if (i >= each) continue;
    const int bucket = kSelectDigits - 1 - (static_cast<int>(threadIdx.x) * each + i);
    for (unsigned rank = 0; rank < cluster_size(); ++rank) count[i] += cluster_shared(shared.histogram, rank)[bucket];
    mine += count[i];
  }
  uint64_t total = 0;
  uint32_t above = static_cast<uint32_t>(block_exclusive_scan<uint64_t>(mine, shared.scan[0], total));
#pragma unroll
  for (int i = 0; i < kSelectDigits / 256; ++i) {
    if (i < each && above < open && open <= above + count[i]) {
      shared.bucket = kSelectDigits - 1 - (static_cast<int>(threadIdx.x) * each + i);
      shared.above = above;
    }
    above += count[i];
  }
  row_barrier();  // the histograms are no longer read; bucket and above are set
}

struct SelectLimit {
  uint64_t key;   // candidates above it stay
  uint32_t ties;  // and the first `ties` that equal it
};

template <class T>
__device__ __forceinline__ SelectLimit radix_select(const SelectPart<T>& part, SelectShared& shared, uint32_t open) {
  uint64_t prefix = 0;
  constexpr int kBits[] = {11, 11, 10}, kShift[] = {21, 10, 0};
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    count_digit(part, shared, prefix, kBits[pass], kShift[pass]);
    find_bucket(shared, open);
    prefix = prefix << kBits[pass] | shared.bucket;
    open -= shared.above;
  }
  return {prefix, open};
}

// Counts of a token or a group: those that stay in the low half, those that equal the limit in the high half.
__device__ __forceinline__ uint64_t stays_of(uint32_t key, const SelectLimit& limit) {
  if (key == kKeyPadding) return 0;
  if (key == kKeyStays) return 1;
  return key > limit.key ? 1 : key == limit.key ? uint64_t(1) << 32 : 0;
}

__device__ __forceinline__ uint32_t number_of(uint64_t stays, uint32_t ties) {
  const uint32_t equal = static_cast<uint32_t>(stays >> 32);
  return static_cast<uint32_t>(stays) + (equal < ties ? equal : ties);
}

// Counts of the blocks before this one.
template <class T>
__device__ __forceinline__ uint64_t stays_before(const SelectPart<T>& part, const SelectLimit& limit,
                                                 SelectShared& shared) {
  if (cluster_size() == 1) return 0;
  uint64_t mine = 0;
  for (int64_t j = part.begin + threadIdx.x; j < part.end; j += blockDim.x) mine += stays_of(part.key(j), limit);
  mine = block_sum(mine, shared.scan[0]);
  if (threadIdx.x == 0) shared.exchange = mine;
  cluster_barrier();
  uint64_t before = 0;
  for (unsigned rank = 0; rank < cluster_rank(); ++rank) before += *cluster_shared(&shared.exchange, rank);
  cluster_barrier();
  return before;
}

// Writes the positions that stay; returns their number up to this block's end.
template <class T>
__device__ __forceinline__ uint32_t write_kept(const SelectPart<T>& part, const SelectLimit& limit,
                                               SelectShared& shared, int64_t* keep, int64_t capacity) {
  uint64_t base = stays_before(part, limit, shared);
  int turn = 0;
  for (int64_t first = part.begin; first < part.end; first += int64_t(blockDim.x) * kSelectItems, turn ^= 1) {
    const int64_t j = first + int64_t(threadIdx.x) * kSelectItems;
    uint64_t stays[kSelectItems], mine = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      stays[i] = j + i < part.end ? stays_of(part.key(j + i), limit) : 0;
      mine += stays[i];
    }
    uint64_t before = base + block_exclusive_scan(mine, shared.scan[turn], total);
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const uint32_t place = number_of(before, limit.ties);
      before += stays[i];
      if (number_of(before, limit.ties) > place && place < capacity) keep[place] = j + i;
    }
    base += total;
  }
  return number_of(base, limit.ties);
}

template <class T>
__global__ void __launch_bounds__(1024) select_kernel(const __grid_constant__ SelectParameters p) {
  MUSTDROP_SHARED_MEMORY(memory);
  SelectShared& shared = *reinterpret_cast<SelectShared*>(memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory + sizeof(SelectShared));  // [part]
  // In a fused operator the scores may still be running.
  wait_for_previous();
  const int64_t b = blockIdx.x / cluster_size();
  SelectPart<T> part;
  part.row = {static_cast<const T*>(p.scores) + b * p.score_stride,
              p.peak ? static_cast<const T*>(p.peak) + b * p.peak_stride : nullptr,
              p.token_types + b * p.type_stride,
              p.protected_tokens ? p.protected_tokens + b * p.protected_stride : nullptr,
              0.0f,
              p.individual_threshold};
  part.begin = clamp_to(int64_t(cluster_rank()) * p.part, 0, p.length);
  part.end = clamp_to(part.begin + p.part, 0, p.length);
  part.keys = nullptr;
  if (p.peak) part.row.limit = p.global_threshold * row_sum(part, shared);

  // Candidates in the low half, protected vision tokens in the high half.
  uint64_t found = 0;
  for (int64_t j = part.begin + threadIdx.x; j < part.end; j += blockDim.x) {
    const uint32_t key = select_key(part.row, j);
    if (p.cached) keys[j - part.begin] = key;
    found += key > kKeyStays ? 1 : key == kKeyStays && part.row.types[j] == kVisionToken ? uint64_t(1) << 32 : 0;
  }
  if (p.cached) part.keys = keys;
  found = cluster_total(block_sum(found, shared.scan[0]), shared);  // its barriers make the keys visible

  const int64_t candidates = static_cast<uint32_t>(found);
  int64_t open = 0;
  if (!p.peak) {
    const int64_t k = p.budgets ? clamp_to(p.budgets[b * p.budget_stride], 0, p.length) : p.k;
    open = clamp_to(k - static_cast<int64_t>(found >> 32), 0, candidates);
  }
  open += (candidates - open) % p.drop_multiple;

  SelectLimit limit{uint64_t(1) << 32, 0};  // open == 0: no candidate stays
  if (open == candidates)
    limit = {kKeyStays, 0};
  else if (open > 0)
    limit = radix_select(part, shared, static_cast<uint32_t>(open));

  int64_t* keep = p.keep + b * p.capacity;
  const uint32_t kept = write_kept(part, limit, shared, keep, p.capacity);
  if (cluster_rank() + 1 < cluster_size()) return;
  if (threadIdx.x == 0) p.counts[b] = static_cast<int32_t>(kept);
  for (int64_t i = kept + int64_t(threadIdx.x); i < p.capacity; i += blockDim.x) keep[i] = -1;
}

}  // namespace mustdrop
