// SPDX-License-Identifier: Apache-2.0
// Data race detection of emulated kernels by CUDA's ordering rules, independent of the drawn schedule.
//
// The kernels are compiled with -fsanitize=thread, whose runtime races.cpp replaces: each load and store calls a hook
// that compares it with earlier accesses. Two accesses of one location, one of them a write, must be of one thread, or
// both atomic, or ordered by a barrier that both threads passed between them: __syncwarp in a warp, __syncthreads in a
// block, the cluster's barrier in a cluster. Between clusters only a flag orders: accesses of the publishing block
// before its thread's last barrier precede later accesses of the waiting thread, and accesses of the waiting block
// after its next barrier. (Flags are not transitive over a third block, and a location that several blocks have read
// stays unordered with a write: the detector errs on the side of reports.) A relaxed barrier of the cluster orders reads
// before it with writes after it, and nothing else. Shuffles and votes order nothing. Reads of unwritten shared memory
// are reported too, and accesses to what the previous launch has written by a thread of an overlapping launch that has
// not waited for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulation::races {

// A flag that a block waited for: orders the accesses of `block` before its barrier number `before`.
struct Acquired {
  uint32_t block, before;
  uint32_t thread, after;  // before later accesses of `thread`, and of its block past `after` barriers
};

// The ordering state of a thread of the launch.
struct ThreadState {
  uint32_t thread = 0;      // of the whole launch
  uint32_t block_size = 1;  // threads of a block
  uint32_t cluster_size = 1;
  uint32_t warp_barriers = 0, block_barriers = 0;       // passed
  uint32_t cluster_arrivals = 0, cluster_waits = 0;     // of the cluster's barrier
  uint32_t cluster_releases = 0, cluster_acquires = 0;  // those of them that are not relaxed
  bool publishes = false;                               // the latest arrival was not relaxed
  bool overlaps = false;                                // the previous launch may still run
  const char *stack = nullptr, *stack_end = nullptr;    // private to the thread
  std::vector<Acquired>* acquired = nullptr;            // by its block
};

enum class Kind { read, write, atomic };

extern __thread ThreadState* running;  // the kernel's thread that this host thread runs; null if none

void begin_launch();  // orders all earlier accesses
void fresh(const void* memory, size_t bytes,
           bool shared);  // forgets earlier accesses; `shared`: reports reads before writes
void access(const void* memory, size_t bytes, Kind kind, const void* code);
void copy_starts(void* to, const void* from, unsigned bytes, unsigned size, const void* code);  // asynchronous
void copy_ends(void* to, unsigned size, const void* code);
void release(const int32_t* flag, const void* code);  // the thread sets it
void acquire(const int32_t* flag, const void* code);  // the thread has read it as set

}  // namespace cuda_emulation::races
