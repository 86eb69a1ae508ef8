// SPDX-License-Identifier: Apache-2.0
// The moves of kernel.cuh for few long streams: a block executes one chunk of consecutive moves.
//
// Race freedom: a store of chunk c can only overwrite sources of chunks <= c (kernel.cuh). So a block reads all sources
// of its chunk, publishes a flag, waits for the flags of the preceding chunks whose sources its targets overlap, and
// then stores. keep ascends, so the sources of a chunk lie between its first and its last source, and so do its
// targets. The chunks to wait for are few: the preceding one or some before it if little is dropped, one or two at half
// the distance if every second position is dropped, none if nothing is dropped so far.
//
// Deadlock freedom: blocks start in any order and not all at once, so a block takes its number from a counter, and
// blocks with lower numbers are running. A number stands for (chunk, stream), lower chunks first; only higher numbers
// wait for it, and no block waits between taking its number and publishing its flag. If `keep` does not ascend, blocks
// wait for other flags, but only for flags that are published.
//
// Pieces are stored in shared memory as they are read: then their loads are complete before the flag is published, and
// the registers are free for other blocks of the multiprocessor.
#pragma once

#include "compact_kv/kernel.cuh"

namespace mustdrop {

constexpr int kCompactTiles = 2;  // of kCompactUnroll pieces per thread

struct CompactChunks {
  int32_t* ticket;  // [1], zero before the launch
  int32_t* read;    // [streams, chunks], zero before the launch; nonzero once the sources of the chunk have been read
  int64_t batch, streams, chunks;
  int32_t moves;  // of a chunk
};

__host__ __device__ constexpr int32_t compact_chunk_moves(int32_t columns) {
  return kCompactTiles * kCompactUnroll * (kCompactThreads / columns);
}

constexpr int kCompactTicketBytes = 16;  // of shared memory; then the moves, then the pieces

template <class Piece>
__host__ __device__ constexpr int64_t compact_chunk_bytes(int32_t moves) {
  return kCompactTicketBytes + moves * int64_t(sizeof(CompactMove)) +
         kCompactTiles * kCompactUnroll * kCompactThreads * int64_t(sizeof(Piece));
}
static_assert(compact_chunk_bytes<uint4>(compact_chunk_moves(1)) <= 99 << 10, "the limit of a block on every device");

// The block's number. Called by the whole block.
__device__ __forceinline__ int compact_ticket(int32_t* counter, int32_t* shared) {
  if (threadIdx.x == 0) *shared = atomicAdd(counter, 1);
  __syncthreads();
  return *shared;
}

// Waits for the preceding chunks whose sources this one overwrites; each thread for different chunks.
__device__ __forceinline__ void compact_wait(const CompactStream& s, bool align_end, const CompactChunks& c,
                                             const int32_t* read,  // [chunks]
                                             int64_t chunk) {
  const auto source = [&](int64_t step) { return s.keep[compact_entry(s, align_end, step)]; };
  const auto target = [&](int64_t step) { return compact_target(s, align_end, compact_entry(s, align_end, step)); };
  const auto comes_before = [&](int64_t a, int64_t b) { return align_end ? a > b : a < b; };
  const int64_t begin = chunk * c.moves, end = begin + c.moves < s.n ? begin + c.moves : s.n;
  const int64_t first = target(begin), last = target(end - 1);
  for (int64_t other = chunk - 1 - threadIdx.x; other >= 0; other -= kCompactThreads) {
    if (comes_before(source((other + 1) * c.moves - 1), first)) break;  // as do those before it
    const int64_t other_first = source(other * c.moves);
    // With align_end the entries of -1 past the kept ones come first; they do not bound the sources after them.
    if (other_first < 0 || !comes_before(last, other_first)) wait_published(read + other);
  }
}

template <class Piece, int kLayers>
__global__ void __launch_bounds__(kCompactThreads)
    compact_chunks_kernel(const __grid_constant__ CompactParameters<kLayers> p,
                          const __grid_constant__ CompactChunks c) {
  MUSTDROP_SHARED_MEMORY(shared);
  CompactMove* moves = reinterpret_cast<CompactMove*>(shared + kCompactTicketBytes);  // [c.moves]
  Piece* pieces = reinterpret_cast<Piece*>(moves + c.moves);  // [kCompactTiles, kCompactUnroll, kCompactThreads]
  const int64_t number = compact_ticket(c.ticket, reinterpret_cast<int32_t*>(shared));
  const int64_t chunk = number / c.streams, stream = number % c.streams;
  const int64_t split = stream % p.splits, h = stream / p.splits % p.heads, b = stream / p.splits / p.heads % c.batch;
  const int64_t which = stream / p.splits / p.heads / c.batch;
  const CompactLayer& layer = p.layers[which / 2];
  const CompactCache& cache = layer.cache[which % 2];
  if (h >= layer.heads) return;
  const CompactStream s = compact_stream(p, layer, b, h);
  const int64_t begin = chunk * c.moves;
  if (begin >= s.n) return;

  CompactRows rows;
  char* column = compact_column<Piece>(p, cache, b, h, split, rows);
  rows.moves = static_cast<int>(s.n - begin < c.moves ? s.n - begin : c.moves);
  for (int i = threadIdx.x; i < rows.moves; i += kCompactThreads)
    moves[i] = compact_move(p.pages, cache, s, p.align_end, begin + i);
  __syncthreads();

  Piece held[kCompactUnroll] = {};
#pragma unroll 1
  for (int tile = 0; tile < kCompactTiles; ++tile) {
    compact_load(held, moves, column, rows, tile);
#pragma unroll
    for (int u = 0; u < kCompactUnroll; ++u)
      pieces[(tile * kCompactUnroll + u) * kCompactThreads + threadIdx.x] = held[u];
  }
  __syncthreads();  // the chunk's sources have been read
  int32_t* read = c.read + stream * c.chunks;
  if (threadIdx.x == 0) publish(read + chunk);
  compact_wait(s, p.align_end, c, read, chunk);
  __syncthreads();  // each thread's waits hold for the whole block
#pragma unroll 1
  for (int tile = 0; tile < kCompactTiles; ++tile) {
#pragma unroll
    for (int u = 0; u < kCompactUnroll; ++u)
      held[u] = pieces[(tile * kCompactUnroll + u) * kCompactThreads + threadIdx.x];
    compact_store(held, moves, column, rows, tile);
  }
}

}  // namespace mustdrop
