// SPDX-License-Identifier: Apache-2.0
// Data races of emulated kernels, found from CUDA's rules and not from the schedule that happened to be drawn.
//
// The kernels are compiled with -fsanitize=thread, but its runtime is replaced (races.cpp): each load and store calls a hook
// that compares it with the accesses before it. Two accesses of one place, one of them a write, have to be of one thread, or
// both atomic, or ordered by a barrier that both threads have gone through between them: __syncwarp in a warp, __syncthreads
// in a block, the cluster's barrier in a cluster. Between clusters only a flag orders: what the block of the thread that
// sets it did before that thread's last barrier comes before what the thread that waited for it does next, and before
// what its block does after the next barrier. (Flags are not followed through a third block, and a place that several
// blocks have read stays unordered with a write: a kernel that needs more is refused, not waved through.) Shuffles and
// votes order nothing. A read of shared memory that nobody has written is reported too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulation::races {

// A block has waited for a flag: what another block did before it had gone through so many barriers is over.
struct Acquired {
  uint32_t block, before;
  uint32_t thread, after;  // for the thread that waited, and for its block past so many barriers
};

// A thread of the launch, as far as order goes.
struct ThreadState {
  uint32_t thread = 0;      // of the whole launch
  uint32_t block_size = 1;  // threads of a block
  uint32_t cluster_size = 1;
  uint32_t warp_barriers = 0, block_barriers = 0;     // gone through
  uint32_t cluster_arrivals = 0, cluster_waits = 0;   // of the cluster's barrier
  const char *stack = nullptr, *stack_end = nullptr;  // its own: nobody else's business
  std::vector<Acquired>* acquired = nullptr;          // by its block
};

enum class Kind { read, write, atomic };

extern __thread ThreadState* running;  // the thread of the kernel that this host thread runs, null where none does

void begin_launch();                                        // what was accessed before is over
void fresh(const void* memory, size_t bytes, bool shared);  // nobody has used it; `shared`: nor may read it unwritten
void access(const void* memory, size_t bytes, Kind kind, const void* code);
void copy_starts(void* to, const void* from, unsigned bytes, unsigned size, const void* code);  // asynchronous
void copy_ends(void* to, unsigned size, const void* code);
void release(const int32_t* flag, const void* code);  // the thread sets it
void acquire(const int32_t* flag, const void* code);  // the thread has seen it set

}  // namespace cuda_emulation::races
