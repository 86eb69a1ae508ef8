// SPDX-License-Identifier: Apache-2.0
// The scores on the CPU, compiled per instruction set (common/cpu.h).
//
// Products: the query rows of a key head are packed once, transposed, into tiles [dim, width * kLanes]; a block of
// kKeys keys is multiplied with a tile by broadcasting one key element at a time, so keys need no transposition and
// sums stay in registers. Few lanes would leave a vector nearly empty: then keys are read once, with dot products.
// Levels that multiply pairs or tiles of bfloat16 (cpu_pairs.h, cpu_tiles.h) read bfloat16 keys without conversion.
// Exponentials are relative to the maximum of their chunk, so each score is computed once: after all chunks, a factor
// per chunk and lane turns them into probabilities.
#include "attention_scores/cpu_kernel.h"

#include "attention_scores/cpu_pairs.h"
#include "attention_scores/cpu_tiles.h"
#include "common/cpu_dot.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

// The register block: kKeys * kWidth sums, kWidth query vectors and a broadcast key must fit into the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kKeys = 8, kWidth = 3;  // of 32
#elif defined(__AVX2__)
constexpr int kKeys = 4, kWidth = 3;  // of 16
#else
constexpr int kKeys = 4, kWidth = 2;
#endif
static_assert(kChunk % kKeys == 0 && kLaneStep % kLanes == 0 && kWidth * kLanes <= kMaxTile, "blocks must tile chunks");

constexpr int64_t kFewLanes = 3;  // up to it dot products are faster; a fourth lane costs as much as a full vector

constexpr float kHuge = 3.402823466e38f;

// Calls body(first vector, width as a compile-time constant) for tiles that cover `vectors`.
template <int N>
struct Width {
  static constexpr int value = N;
};

template <class Body>
inline void for_each_tile(int64_t vectors, const Body& body) {
  int64_t v = 0;
  while (v < vectors) {
    const int64_t left = vectors - v;
    if (kWidth == 3 && left >= 3 && left != 4) {
      body(v, Width<kWidth>{});
      v += 3;
    } else if (left >= 2) {
      body(v, Width<2>{});
      v += 2;
    } else {
      body(v, Width<1>{});
      v += 1;
    }
  }
}

inline int64_t vectors_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// ---------------------------------------------------------------------------------------------- keys and queries

template <class T>
void convert_row(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i * stride]);
}

// Converts one chunk's keys to float32, with zeros up to the next multiple of kKeys.
template <class T>
void convert_keys(const ScoreParameters& p, const T* k,
                  const int64_t* offset,  // [count]
                  int64_t count,
                  float* keys) {  // [kChunk, dim]
  for (int64_t i = 0; i < count; ++i) convert_row(k + offset[i], p.k_dim, p.dim, keys + i * p.dim);
  const int64_t blocks = (count + kKeys - 1) / kKeys;
  memset(keys + count * p.dim, 0, (blocks * kKeys - count) * p.dim * sizeof *keys);
}

template <class T>
const T* query_row(const ScoreParameters& p, int64_t head, int64_t lane) {
  const int64_t query_head = head * p.group + lane / p.rows;
  return static_cast<const T*>(p.q) + query_head * p.q_head + p.row_offset[lane % p.rows];
}

// Packs one key head's scaled query rows: [lanes, dim] if the lanes are few, else [dim, width * kLanes] per tile with
// zeros past the lanes.
template <class T>
void pack_rows(const ScoreParameters& p, int64_t head, float* query) {
  if (p.lanes <= kFewLanes && p.k_dim == 1) {
    for (int64_t lane = 0; lane < p.lanes; ++lane) {
      const T* row = query_row<T>(p, head, lane);
      for (int64_t d = 0; d < p.dim; ++d) query[lane * p.dim + d] = p.scale * to_float(row[d]);
    }
    return;
  }
  for_each_tile(vectors_of(p.lanes), [&](int64_t v, auto width) {
    constexpr int64_t kTile = decltype(width)::value * kLanes;
    float* tile = query + v * kLanes * p.dim;
    if (p.paired) {
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t lane = v * kLanes + i;
        const bfloat16* row = lane < p.lanes ? query_row<bfloat16>(p, head, lane) : nullptr;
        for (int64_t d = 0; d + 1 < p.dim; d += 2) {
          if (row)
            memcpy(tile + d / 2 * kTile + i, row + d, sizeof *tile);
          else
            tile[d / 2 * kTile + i] = 0.0f;
        }
      }
      return;
    }
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t lane = v * kLanes + i;
      if (lane >= p.lanes) {
        for (int64_t d = 0; d < p.dim; ++d) tile[d * kTile + i] = 0.0f;
        continue;
      }
      const T* row = query_row<T>(p, head, lane);
      for (int64_t d = 0; d < p.dim; ++d) tile[d * kTile + i] = p.scale * to_float(row[d]);
    }
  });
}

void pack_lse(const ScoreParameters& p, int64_t head, float* lane_lse) {  // [lane_stride]
  for (int64_t lane = 0; lane < p.lane_stride; ++lane) {
    const int64_t query_head = head * p.group + lane / p.rows;
    lane_lse[lane] = lane < p.lanes ? p.lse[query_head * p.lse_head + p.lse_offset[lane % p.rows]] : 0.0f;
  }
}

// ---------------------------------------------------------------------------------------------- products

// scores = keys . query for one chunk and one tile.
template <int W>
void multiply_tile(const float* keys,  // [kChunk, dim]
                   int64_t count,
                   const float* query,  // [dim, W * kLanes]
                   int64_t dim,
                   float* scores) {  // [kChunk, W * kLanes]; past count: unspecified
  for (int64_t first = 0; first < count; first += kKeys, keys += kKeys * dim) {
    VecFloat sums[kKeys][W];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) sums[i][w] = VecFloat{};
    for (int64_t d = 0; d < dim; ++d) {
      VecFloat q[W];
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) q[w] = load(query + (d * W + w) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const VecFloat key = splat(keys[i * dim + d]);
#pragma GCC unroll 3
        for (int w = 0; w < W; ++w) sums[i][w] += key * q[w];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) store(scores + ((first + i) * W + w) * kLanes, sums[i][w]);
  }
}

// multiply_tile for few lanes, from k without conversion; zeros past the lanes.
template <class T>
void dot_keys(const ScoreParameters& p, const T* k,
              const int64_t* offset,  // [count]
              int64_t count,
              const float* query,  // [lanes, dim]
              float* scores) {     // [kChunk, kLanes]
  memset(scores, 0, count * kLanes * sizeof *scores);
  int64_t i = 0;
  for (; i + kDotRows <= count; i += kDotRows) {
    const T* rows[kDotRows];
    for (int j = 0; j < kDotRows; ++j) rows[j] = k + offset[i + j];
    for (int64_t lane = 0; lane < p.lanes; ++lane)
      dot_rows(query + lane * p.dim, rows, p.dim, scores + i * kLanes + lane, kLanes);
  }
  for (; i < count; ++i) {
    const T* const row[1] = {k + offset[i]};
    for (int64_t lane = 0; lane < p.lanes; ++lane)
      dot_rows(query + lane * p.dim, row, p.dim, scores + i * kLanes + lane, kLanes);
  }
}

struct Chunk {
  const int64_t* offset;    // [count]
  const int32_t* position;  // [count]
  int64_t count;
  bool vision;
  bool hidden;  // some row does not attend to some key
};

Chunk chunk_at(const ScoreParameters& p, int64_t c) {
  const bool vision = c < p.vision_chunks;
  const int64_t first = (vision ? c : c - p.vision_chunks) * kChunk;
  const int64_t rest = (vision ? p.vision : p.text) - first;
  const int64_t count = rest < kChunk ? rest : kChunk;
  const int32_t* position = (vision ? p.vision_position : p.text_position) + first;
  return {(vision ? p.vision_offset : p.text_offset) + first, position, count, vision,
          position[count - 1] > p.first_position};
}

// score_tiles_of for paired products.
template <class Use>
void pair_tiles(const ScoreParameters& p, int64_t head, const Chunk& chunk, const float* query, float* keys,
                float* scores, const Use& use) {
  const bfloat16* k = static_cast<const bfloat16*>(p.k) + head * p.k_head;
  for_each_tile(vectors_of(p.lanes), [&](int64_t v, auto width) {
    constexpr int W = decltype(width)::value;
    const float* tile = query + v * kLanes * p.dim;
    if (p.tiled)
      multiply_tiles<W>(k, chunk.offset, chunk.count, tile, p.dim, p.scale, reinterpret_cast<bfloat16*>(keys), scores);
    else
      multiply_pairs<kKeys, W>(k, chunk.offset, chunk.count, tile, p.dim, p.scale, scores);
    use(v * kLanes, width, scores);
  });
}

// Calls use(first lane, width, scores [count, width * kLanes]) for all tiles of lanes of one key head and one chunk.
template <class T, class Use>
void score_tiles_of(const ScoreParameters& p, int64_t head, const Chunk& chunk, float* scratch, const Use& use) {
  const T* k = static_cast<const T*>(p.k) + head * p.k_head;
  const float* query = p.query + head * p.dim * p.lane_stride;
  float *keys = scratch, *scores = scratch + kChunk * p.dim;
  if (p.lanes <= kFewLanes && p.k_dim == 1) {
    dot_keys(p, k, chunk.offset, chunk.count, query, scores);
    return use(0, Width<1>{}, scores);
  }
  if (p.paired) return pair_tiles(p, head, chunk, query, keys, scores, use);
  convert_keys(p, k, chunk.offset, chunk.count, keys);
  for_each_tile(vectors_of(p.lanes), [&](int64_t v, auto width) {
    multiply_tile<decltype(width)::value>(keys, chunk.count, query + v * kLanes * p.dim, p.dim, scores);
    use(v * kLanes, width, scores);
  });
}

template <class Use>
void score_tiles(const ScoreParameters& p, int64_t head, const Chunk& chunk, float* scratch, const Use& use) {
  with_element(p.element, [&](auto type) { score_tiles_of<decltype(type)>(p, head, chunk, scratch, use); });
}

// ---------------------------------------------------------------------------------------------- without lse

// Sets scores to -inf where a row does not attend to a key.
template <int W>
void hide(float* scores,            // [count, W * kLanes]
          const int32_t* position,  // [count] of the keys
          int64_t count,
          const int32_t* rows_at) {  // [W * kLanes] positions of the lanes' rows
  for (int64_t i = 0; i < count; ++i)
    for (int w = 0; w < W; ++w) {
      float* at = scores + (i * W + w) * kLanes;
      const VecInt hidden = load_as<VecInt>(rows_at + w * kLanes) < position[i] - VecInt{};
      store(at, hidden ? splat(-__builtin_inff()) : load(at));
    }
}

// Computes weights (of a vision chunk), maximum and sum of exponentials of one chunk and one tile.
template <int W>
void weigh_tile(const float* scores,  // [count, W * kLanes]
                int64_t count, int64_t lane_stride,
                float* weights,  // [count, lane_stride] or null
                float* stats) {  // [2, lane_stride]
  VecFloat maximum[W], sum[W];
  for (int w = 0; w < W; ++w) maximum[w] = splat(-kHuge), sum[w] = VecFloat{};
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) maximum[w] = larger(maximum[w], load(scores + (i * W + w) * kLanes));
  // Finite: neither a row of -inf nor one with +inf may subtract infinities.
  for (int w = 0; w < W; ++w) maximum[w] = maximum[w] > splat(kHuge) ? splat(kHuge) : maximum[w];
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) {
      const VecFloat e = exp_of(load(scores + (i * W + w) * kLanes) - maximum[w]);
      sum[w] += e;
      if (weights) store(weights + i * lane_stride + w * kLanes, e);
    }
  for (int w = 0; w < W; ++w) {
    store(stats + w * kLanes, maximum[w]);
    store(stats + lane_stride + w * kLanes, sum[w]);
  }
}

void score_chunk(const ScoreParameters& p, int64_t local_head, int64_t c, float* scratch) {
  const Chunk chunk = chunk_at(p, c);
  float* stats = p.stats + (local_head * (p.vision_chunks + p.text_chunks) + c) * 2 * p.lane_stride;
  float* weights = p.weights + (local_head * p.vision_chunks + c) * kChunk * p.lane_stride;
  score_tiles(p, p.first_head + local_head, chunk, scratch, [&](int64_t lane, auto width, float* scores) {
    constexpr int W = decltype(width)::value;
    if (chunk.hidden) hide<W>(scores, chunk.position, chunk.count, p.lane_position + lane);
    weigh_tile<W>(scores, chunk.count, p.lane_stride, chunk.vision ? weights + lane : nullptr, stats + lane);
  });
}

// Replaces a lane vector's maxima by the factors that turn its weights into probabilities.
void normalize_lanes(const ScoreParameters& p, int64_t local_head, int64_t lane) {
  const int64_t chunks = p.vision_chunks + p.text_chunks;
  float* stats = p.stats + local_head * chunks * 2 * p.lane_stride + lane;
  VecFloat maximum = splat(-kHuge), sum{};
  for (int64_t c = 0; c < chunks; ++c) maximum = larger(maximum, load(stats + c * 2 * p.lane_stride));
  for (int64_t c = 0; c < chunks; ++c) {
    const float* of_chunk = stats + c * 2 * p.lane_stride;
    sum += load(of_chunk + p.lane_stride) * exp_of(load(of_chunk) - maximum);
  }
  const VecFloat inverse = sum == VecFloat{} ? VecFloat{} : 1.0f / sum;
  for (int64_t c = 0; c < p.vision_chunks; ++c) {
    float* of_chunk = stats + c * 2 * p.lane_stride;
    store(of_chunk, exp_of(load(of_chunk) - maximum) * inverse);
  }
}

// ---------------------------------------------------------------------------------------------- mean and results

// mean += weights * factor, head by head of one key head's group; `factor` null: 1.
void add_heads(const ScoreParameters& p, int64_t count,
               const float* weights,  // [count, lane_stride]
               const float* factor,   // [lane_stride]
               float* mean) {         // [count, row_stride]
  const int64_t vectors = vectors_of(p.rows);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < p.group; ++g)
      for (int64_t v = 0; v < vectors; ++v) {
        // The last vector of a head's rows overlaps the next head's; values past the rows are never used.
        const int64_t lane = g * p.rows + v * kLanes;
        VecFloat w = load(weights + i * p.lane_stride + lane);
        if (factor) w *= load(factor + lane);
        float* to = mean + i * p.row_stride + v * kLanes;
        store(to, load(to) + w);
      }
}

// Writes the results of one vision chunk; rows that do not attend to a key count as zero.
void finish_chunk(const ScoreParameters& p, const Chunk& chunk, float* mean) {  // [kChunk, row_stride]
  const int64_t vectors = vectors_of(p.rows);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int32_t position = chunk.position[i];
    VecFloat sum{}, maximum{};
    for (int64_t v = 0; v < vectors; ++v) {
      float* at = mean + i * p.row_stride + v * kLanes;
      const VecInt seen = load_as<VecInt>(p.row_position + v * kLanes) >= position - VecInt{};
      const VecFloat weight = seen ? load(at) / static_cast<float>(p.heads) : VecFloat{};
      sum += weight;
      maximum = larger_or_nan(maximum, weight);
      store(at, weight);
    }
    if (!p.total) continue;
    p.total[position] += sum_of(sum);
    float peak = p.peak[position];
    for (int lane = 0; lane < kLanes; ++lane)
      peak = maximum[lane] > peak || maximum[lane] != maximum[lane] ? maximum[lane] : peak;
    p.peak[position] = peak;
  }
  if (!p.map) return;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t i = 0; i < chunk.count; ++i) p.map[r * p.map_stride + chunk.position[i]] = mean[i * p.row_stride + r];
}

void clear(float* values, int64_t n) { memset(values, 0, n * sizeof *values); }

// ---------------------------------------------------------------------------------------------- with lse

template <int W>
void weigh_tile_normalized(const float* scores,  // [count, W * kLanes]
                           int64_t count, int64_t lane_stride,
                           const float* lse,  // [W * kLanes]
                           float* weights) {  // [count, lane_stride]
  VecFloat minus[W];
  VecInt live[W];
  for (int w = 0; w < W; ++w) {
    minus[w] = load(lse + w * kLanes);
    live[w] = minus[w] != splat(-__builtin_inff());  // else the row attends to no key
  }
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) {
      const VecFloat e = exp_of(load(scores + (i * W + w) * kLanes) - minus[w]);
      store(weights + i * lane_stride + w * kLanes, live[w] ? e : VecFloat{});
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------- entry points

void pack_query(const ScoreTask& task, int64_t begin, int64_t end) {
  const ScoreParameters& p = *task.parameters;
  for (int64_t head = begin; head < end; ++head) {
    float* query = p.query + head * p.dim * p.lane_stride;
    with_element(p.element, [&](auto type) { pack_rows<decltype(type)>(p, head, query); });
    if (p.lse) pack_lse(p, head, p.lane_lse + head * p.lane_stride);
  }
}

void score_chunks(const ScoreTask& task, int64_t begin, int64_t end) {
  const int64_t chunks = task.parameters->vision_chunks + task.parameters->text_chunks;
  for (int64_t item = begin; item < end; ++item)
    score_chunk(*task.parameters, item / chunks, item % chunks, task.scratch);
}

void normalize(const ScoreTask& task, int64_t begin, int64_t end) {
  const ScoreParameters& p = *task.parameters;
  const int64_t groups = p.lane_stride / kLaneStep;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t lane = item % groups * kLaneStep;
    for (int64_t i = lane; i < lane + kLaneStep && i < p.lanes; i += kLanes) normalize_lanes(p, item / groups, i);
  }
}

void average_heads(const ScoreTask& task, int64_t begin, int64_t end) {
  const ScoreParameters& p = *task.parameters;
  const int64_t chunks = p.vision_chunks + p.text_chunks;
  for (int64_t c = begin; c < end; ++c) {
    const Chunk chunk = chunk_at(p, c);
    float* mean = p.mean + c * kChunk * p.row_stride;
    if (p.first_head == 0) clear(mean, chunk.count * p.row_stride);
    for (int64_t h = 0; h < p.block_heads; ++h)
      add_heads(p, chunk.count, p.weights + (h * p.vision_chunks + c) * kChunk * p.lane_stride,
                p.stats + (h * chunks + c) * 2 * p.lane_stride, mean);
    if (p.first_head + p.block_heads == p.kv_heads) finish_chunk(p, chunk, mean);
  }
}

void score_normalized(const ScoreTask& task, int64_t begin, int64_t end) {
  const ScoreParameters& p = *task.parameters;
  float* weights = task.scratch + kChunk * (p.dim + kMaxTile);
  for (int64_t c = begin; c < end; ++c) {
    const Chunk chunk = chunk_at(p, c);
    float* mean = p.mean + c * kChunk * p.row_stride;
    clear(mean, chunk.count * p.row_stride);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const float* lse = p.lane_lse + head * p.lane_stride;
      score_tiles(p, head, chunk, task.scratch, [&](int64_t lane, auto width, float* scores) {
        weigh_tile_normalized<decltype(width)::value>(scores, chunk.count, p.lane_stride, lse + lane, weights + lane);
      });
      add_heads(p, chunk.count, weights, nullptr, mean);
    }
    finish_chunk(p, chunk, mean);
  }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
