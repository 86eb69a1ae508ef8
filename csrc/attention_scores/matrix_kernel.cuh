// SPDX-License-Identifier: Apache-2.0
// text_vision_scores with the matrix instructions, for float16 and bfloat16.
//   P[h, t, j] = exp(scale q[h, t] . k[h, j] - lse[h, t]) for visible j <= t;  A[t, j] = mean over h of P[h, t, j]
//   total[j] = sum over voting rows t of A[t, j],  peak[j] = max over voting rows t of A[t, j]
//
// Keys are on the M side, voting rows on the N side: a warp has 16 keys, a block 64, and loops over heads inside, so that the
// sum over heads stays in registers and no attention matrix exists. A cluster of blocks shares the heads of a key tile and
// adds in the order of the ranks over distributed shared memory.
//
// A dot product does not care about the order of its terms. So a lane reads 16 consecutive bytes of a key straight from
// global memory and calls them the a-operands of two instructions, and reads the same 16 bytes of the row from shared memory
// as the b-operands: no transposition, no ldmatrix, every access 16 bytes. The next head's keys are on their way (registers)
// and so are its rows (cp.async) while this one's are multiplied.
#pragma once

#include "attention_scores/sequence.cuh"

namespace mustdrop {

constexpr int kMatrixKeys = 64;  // of a block

template <int kDim, int kRows>
struct MatrixShape {
  static constexpr int kSteps = kDim / 32;             // 16-byte reads of a lane per key
  static constexpr int kPitch = kDim * 2 + 64;         // bytes of a row in shared memory: 8 lanes hit all banks
  static constexpr int kStage = kRows * kPitch;        // bytes of the rows of one head
  static constexpr int kSumPitch = kRows + 8;          // floats of a key in the exchange
  static constexpr int kSums = kMatrixKeys * kSumPitch * 4;
  static constexpr int kData = 2 * kStage > kSums ? 2 * kStage : kSums;
};

// Shared memory: rows of two heads (later the sums over heads), then this.
template <int kRows>
struct MatrixShared {
  float normaliser[2][kRows];
  int32_t position[kRows];         // of the tile's rows, in the sequence
  int32_t list[kRows + kScan];     // of the feed
  int32_t scratch[kScoreWarps];
};

// The keys of a lane: rows g and g + 8 of its warp's 16.
struct LaneKeys {
  int64_t index[2];   // in the sequence
  int64_t offset[2];  // in elements, -1: absent or not looked at
};

template <int kSteps>
struct KeyFragment {
  uint4 at[2][kSteps];

  template <class T>
  __device__ __forceinline__ void load(const ScoreParameters& p, const LaneKeys& keys, int key_head) {
    const int t = static_cast<int>(lane_id() % 4) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int d = step * 32 + t;
        at[half][step] = uint4{0, 0, 0, 0};
        if (keys.offset[half] >= 0 && d < p.dim)
          at[half][step] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.k) + keys.offset[half] +
                                                           key_head * p.k_head + d);
      }
  }
};

// Starts the copies of the tile's rows of one head; rows past `rows` and dimensions past dim are zeros.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void fetch_rows(const ScoreParameters& p, const ScoreSequence& s, const int32_t* list, int rows, int h,
                                           char* stage) {
  constexpr int kPieces = kDim / 8;  // 16-byte pieces of a row
  const T* q = static_cast<const T*>(p.q) + h * p.q_head;
  for (int i = threadIdx.x; i < (rows + 7) / 8 * 8 * kPieces; i += kScoreThreads) {
    const int r = i / kPieces, d = i % kPieces * 8;
    const bool valid = r < rows && d < p.dim;
    const T* from = valid ? q + row_offset(p, s, list[r]) + d : q;
    copy16_async(stage + r * MatrixShape<kDim, kRows>::kPitch + d * 2, from, valid);
  }
}

// logits[0..3] of the lane: keys g, g + 8 against rows 2t, 2t + 1 of the group of 8 rows at `rows`.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void multiply(const KeyFragment<kDim / 32>& k, const char* rows, float (&logits)[4]) {
  const char* row = rows + lane_id() / 4 * MatrixShape<kDim, kRows>::kPitch + lane_id() % 4 * 16;
#pragma unroll
  for (int step = 0; step < kDim / 32; ++step) {
    const uint4 b = *reinterpret_cast<const uint4*>(row + step * 64);
    const uint4 low = k.at[0][step], high = k.at[1][step];
    multiply_add_16x8x16<T>(logits, {low.x, high.x, low.y, high.y}, {b.x, b.y});
    multiply_add_16x8x16<T>(logits, {low.z, high.z, low.w, high.w}, {b.z, b.w});
  }
}

// The keys of this lane in the tile that begins at `first`; those whose type is not looked at get no offset.
__device__ __forceinline__ LaneKeys lane_keys(const ScoreParameters& p, const ScoreSequence& s, int64_t first, bool vision_only) {
  LaneKeys keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.index[half] = first + warp_id() * 16 + lane_id() / 4 + half * 8;
    const int type = type_at(p, s, keys.index[half]);
    keys.offset[half] = (vision_only ? type == 2 : type != 0) ? key_offset(p, s, keys.index[half]) : -1;
  }
  return keys;
}

// Adds the probabilities of one head.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void add_head(const KeyFragment<kDim / 32>& k, const LaneKeys& keys, const char* stage,
                                         const float* normaliser, const int32_t* position, int rows, float factor,
                                         float (&sum)[kRows / 8][4]) {
#pragma unroll
  for (int group = 0; group < kRows / 8; ++group) {
    if (group * 8 >= rows) break;
    float logits[4] = {};
    multiply<T, kDim, kRows>(k, stage + group * 8 * MatrixShape<kDim, kRows>::kPitch, logits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = group * 8 + static_cast<int>(lane_id() % 4) * 2 + i % 2;
      const bool seen = keys.index[i / 2] <= position[r] && normaliser[r] != infinity();
      sum[group][i] += seen ? fast_exp2(logits[i] * factor - normaliser[r]) : 0.0f;
    }
  }
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(kScoreThreads) score_matrix_kernel(const __grid_constant__ ScoreParameters p) {
  using Shape = MatrixShape<kDim, kRows>;
  MUSTDROP_SHARED_MEMORY(memory);
  MatrixShared<kRows>& shared = *reinterpret_cast<MatrixShared<kRows>*>(memory + Shape::kData);
  float* sums = reinterpret_cast<float*>(memory);
  const ScoreSequence s = sequence_at(p, blockIdx.y);
  const int64_t first_key = int64_t(blockIdx.x / cluster_size()) * kMatrixKeys;
  KeyShare<kMatrixKeys> share;
  const LaneKeys keys = lane_keys(p, s, first_key, true);
  const HeadRange heads(p);
  const int group_size = p.heads / p.key_heads;
  const float factor = p.scale * kLog2E;

  RowFeed feed{shared.list, shared.scratch, 0, 0, 0};
  const unsigned votes = __ballot_sync(kFullMask, keys.offset[0] >= 0 || keys.offset[1] >= 0);
  if (lane_id() == 0) shared.scratch[warp_id()] = votes != 0;
  __syncthreads();
  bool vision = false;
  for (int w = 0; w < kScoreWarps; ++w) vision |= shared.scratch[w] != 0;
  __syncthreads();
  if (!vision) feed.next = s.q_len;  // nothing to compute; the same in every block of the cluster

  int64_t written = 0;
  for (;;) {
    const int rows = next_rows<kRows>(p, s, feed);
    if (rows == 0) break;
    const int32_t* list = shared.list + feed.first;
    if (static_cast<int>(threadIdx.x) < kRows)
      shared.position[threadIdx.x] =
          static_cast<int>(threadIdx.x) < rows ? static_cast<int32_t>(s.k_len - s.q_len + list[threadIdx.x]) : -1;
    float sum[kRows / 8][4] = {};
    KeyFragment<kDim / 32> now, next;
    const auto prepare = [&](int h) {  // rows and normalisers of head h, into their stage
      fetch_rows<T, kDim, kRows>(p, s, list, rows, h, memory + h % 2 * Shape::kStage);
      if (static_cast<int>(threadIdx.x) < kRows)
        shared.normaliser[h % 2][threadIdx.x] =
            static_cast<int>(threadIdx.x) < rows ? row_normaliser(p, s, h, list[threadIdx.x]) : infinity();
    };
    if (heads.begin < heads.end) {
      next.template load<T>(p, keys, heads.begin / group_size);
      prepare(heads.begin);
    }
    copies_commit();
    for (int h = heads.begin; h < heads.end; ++h) {
      now = next;
      copies_wait<0>();
      __syncthreads();  // the rows of head h are there; those of head h - 1 are no longer read
      if (h + 1 < heads.end) {
        if ((h + 1) / group_size != h / group_size) next.template load<T>(p, keys, (h + 1) / group_size);
        prepare(h + 1);
      }
      copies_commit();
      add_head<T, kDim, kRows>(now, keys, memory + h % 2 * Shape::kStage, shared.normaliser[h % 2], shared.position, rows, factor, sum);
    }
    copies_wait<0>();
    __syncthreads();  // the rows are no longer read: their place takes the sums
    const int key = static_cast<int>(warp_id() * 16 + lane_id() / 4);
#pragma unroll
    for (int group = 0; group < kRows / 8; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(key + i / 2 * 8) * Shape::kSumPitch + group * 8 + static_cast<int>(lane_id() % 4) * 2 + i % 2] = sum[group][i];
    cluster_barrier();
    reduce_heads<kMatrixKeys>(p, s, share, sums, Shape::kSumPitch, rows, written, first_key);
    cluster_barrier();
    feed.first += rows;
    written += rows;
  }
  write_scores<kMatrixKeys>(p, s, share, first_key);
}

// Maximum and sum of the visible logits of a part of the keys, for every voting row of one head.
template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(kScoreThreads) normaliser_matrix_kernel(const __grid_constant__ ScoreParameters p) {
  using Shape = MatrixShape<kDim, kRows>;
  MUSTDROP_SHARED_MEMORY(memory);
  MatrixShared<kRows>& shared = *reinterpret_cast<MatrixShared<kRows>*>(memory + Shape::kData);
  MaximumAndSum* parts = reinterpret_cast<MaximumAndSum*>(memory);  // [kScoreWarps, kRows]
  const int split = static_cast<int>(blockIdx.x), h = static_cast<int>(blockIdx.y), key_head = h / (p.heads / p.key_heads);
  const ScoreSequence s = sequence_at(p, blockIdx.z);
  const float factor = p.scale * kLog2E;
  const int64_t part = ceil_div(ceil_div(p.keys, p.splits), kMatrixKeys) * kMatrixKeys;
  RowFeed feed{shared.list, shared.scratch, 0, 0, 0};
  for (;;) {
    const int rows = next_rows<kRows>(p, s, feed);
    if (rows == 0) return;
    const int32_t* list = shared.list + feed.first;
    const int64_t offset = s.k_len - s.q_len;
    if (static_cast<int>(threadIdx.x) < kRows)
      shared.position[threadIdx.x] = static_cast<int>(threadIdx.x) < rows ? static_cast<int32_t>(offset + list[threadIdx.x]) : -1;
    fetch_rows<T, kDim, kRows>(p, s, list, rows, h, memory);
    copies_commit();
    copies_wait<0>();
    __syncthreads();

    float most[kRows / 8][2], sum[kRows / 8][2] = {};
#pragma unroll
    for (int group = 0; group < kRows / 8; ++group) most[group][0] = most[group][1] = kLowest;
    const int64_t end = clamp_to((split + 1) * part, 0, offset + list[rows - 1] + 1);  // nobody sees what is behind the last row
    for (int64_t first = split * part; first < end; first += kMatrixKeys) {
      const LaneKeys keys = lane_keys(p, s, first, false);
      KeyFragment<kDim / 32> k;
      k.template load<T>(p, keys, key_head);
#pragma unroll
      for (int group = 0; group < kRows / 8; ++group) {
        if (group * 8 >= rows) break;
        float logits[4] = {};
        multiply<T, kDim, kRows>(k, memory + group * 8 * Shape::kPitch, logits);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = group * 8 + static_cast<int>(lane_id() % 4) * 2 + i % 2;
          const bool seen = keys.offset[i / 2] >= 0 && keys.index[i / 2] <= shared.position[r];
          add_logit(most[group][i % 2], sum[group][i % 2], seen ? logits[i] * factor : -infinity());
        }
      }
    }
    __syncthreads();  // the rows are no longer read: their place takes the parts of the warps
#pragma unroll
    for (int group = 0; group < kRows / 8; ++group)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = most[group][i], total = sum[group][i];
        for (int delta = 4; delta < 32; delta *= 2)
          merge_logits(m, total, __shfl_xor_sync(kFullMask, m, delta), __shfl_xor_sync(kFullMask, total, delta));
        if (lane_id() < 4) parts[warp_id() * kRows + group * 8 + lane_id() * 2 + i] = {m, total};
      }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      MaximumAndSum all = parts[threadIdx.x];
      for (int w = 1; w < kScoreWarps; ++w)
        merge_logits(all.most, all.sum, parts[w * kRows + threadIdx.x].most, parts[w * kRows + threadIdx.x].sum);
      partial_at(p, h, split)[partial_row(p, s, list[threadIdx.x])] = all;
    }
    __syncthreads();
    feed.first += rows;
  }
}

}  // namespace mustdrop
