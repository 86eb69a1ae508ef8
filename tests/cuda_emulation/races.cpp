// SPDX-License-Identifier: Apache-2.0
// Shadow memory of the race detector, and the hooks that -fsanitize=thread calls.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_emulation.h"

namespace cuda_emulation::races {

__attribute__((tls_model("initial-exec"))) __thread ThreadState* running = nullptr;

namespace {

// ThreadState shares an access: the later an enumerator, the more threads it stands for.
enum class Reach : uint8_t { none, thread, warp, block, cluster, launch };

// One access, or several that only a barrier of width `reach` orders before another thread's.
struct Access {
  Reach reach = Reach::none;
  bool atomic = false, pending = false;  // pending: an asynchronous copy without a wait
  uint32_t thread = 0;                   // one of them
  uint32_t warp_barriers = 0, block_barriers = 0, cluster_arrivals = 0, cluster_releases = 0;  // the latest
  const void* code = nullptr;
};

// The state of a byte, or of four that were always accessed together.
struct Cell {
  Access write, read;
};

struct Granule {
  uint32_t stamp = 0;    // of the launch (or the block) of the cell; otherwise the cell is empty
  uint32_t written = 0;  // the latest launch that has written it
  bool shared = false, split = false;
  Cell whole;
  std::unique_ptr<std::array<Cell, 4>> bytes;
};

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kMostPages = 4096;
using Page = std::array<Granule, kPageBytes / 4>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = ~uintptr_t(0);
Page* last_page = nullptr;
uint32_t stamp = 1;

struct Release {
  uint32_t block, barriers;
};
std::unordered_map<const int32_t*, Release> releases;  // of this launch

Granule& granule_at(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (number != last_number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last_page = page.get();
  }
  Granule& g = (*last_page)[address % kPageBytes / 4];
  if (g.stamp != stamp) {
    g.stamp = stamp;
    g.shared = g.split = false;
    g.whole = Cell{};
  }
  return g;
}

Reach distance(uint32_t a, uint32_t b) {
  if (a == b) return Reach::thread;
  const uint32_t block_a = a / running->block_size, block_b = b / running->block_size;
  if (block_a == block_b)
    return a % running->block_size / 32 == b % running->block_size / 32 ? Reach::warp : Reach::block;
  return block_a / running->cluster_size == block_b / running->cluster_size ? Reach::cluster : Reach::launch;
}

// Whether a flag of another block orders `before`.
bool handed_over(const Access& before) {
  if (before.reach > Reach::block) return false;  // accesses of several blocks
  const uint32_t block = before.thread / running->block_size;
  return std::any_of(running->acquired->begin(), running->acquired->end(), [&](const Acquired& a) {
    return a.block == block && before.block_barriers < a.before &&
           (a.thread == running->thread || running->block_barriers > a.after);
  });
}

// Whether all accesses of `before` are ordered before the running thread's next one. `reads`: they are reads.
bool ordered(const Access& before, bool reads) {
  if (before.reach == Reach::none) return true;
  if (before.pending) return false;
  const Reach reach = std::max(before.reach, distance(before.thread, running->thread));
  if (reach == Reach::thread) return true;
  if (reach == Reach::launch) return handed_over(before);
  if (running->cluster_acquires > before.cluster_releases) return true;
  if (reads && running->cluster_waits > before.cluster_arrivals) return true;
  if (reach == Reach::cluster) return false;
  if (running->block_barriers > before.block_barriers) return true;
  return reach == Reach::warp && running->warp_barriers > before.warp_barriers;
}

Access mine(bool atomic, const void* code) {
  Access a;
  a.reach = Reach::thread;
  a.atomic = atomic;
  a.thread = running->thread;
  a.warp_barriers = running->warp_barriers;
  a.block_barriers = running->block_barriers;
  a.cluster_arrivals = running->cluster_arrivals;
  a.cluster_releases = running->cluster_releases;
  a.code = code;
  return a;
}

void join(Access& all, const Access& one, bool reads) {
  if (ordered(all, reads)) {
    all = one;
    return;
  }
  all.reach = std::max(all.reach, distance(all.thread, one.thread));
  all.warp_barriers = std::max(all.warp_barriers, one.warp_barriers);
  all.block_barriers = std::max(all.block_barriers, one.block_barriers);
  all.cluster_arrivals = std::max(all.cluster_arrivals, one.cluster_arrivals);
  all.cluster_releases = std::max(all.cluster_releases, one.cluster_releases);
}

std::string place(const void* code) {
  Dl_info info{};
  if (!dladdr(code, &info) || !info.dli_fbase) return "?";
  char text[32];
  std::snprintf(text, sizeof text, "+0x%zx", static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
  return text;
}

[[noreturn]] void report(const char* what, const void* code, const Access& before, const char* did) {
  const uint32_t here_block = running->thread / running->block_size, there_block = before.thread / running->block_size;
  fail("a race: thread " + std::to_string(running->thread % running->block_size) + " of block " +
       std::to_string(here_block) + " " + what + " at " + place(code) + " what thread " +
       std::to_string(before.thread % running->block_size) + " of block " + std::to_string(there_block) + " " + did +
       " at " + place(before.code) + ", with no barrier between them");
}

void visit(Cell& cell, bool shared, Kind kind, const void* code) {
  if (kind == Kind::read) {
    if (shared && cell.write.reach == Reach::none)
      fail("thread " + std::to_string(running->thread) + " reads unwritten shared memory, at " + place(code));
    if (!ordered(cell.write, false)) report("reads", code, cell.write, "writes");
    return join(cell.read, mine(false, code), true);
  }
  const bool both_atomic = kind == Kind::atomic && cell.write.atomic;
  if (!both_atomic && !ordered(cell.write, false)) report("writes", code, cell.write, "writes");
  if (!ordered(cell.read, true)) report("writes", code, cell.read, "reads");
  const Access now = mine(kind == Kind::atomic, code);
  if (both_atomic)
    join(cell.write, now, false);
  else
    cell.write = now;
  cell.read = Access{};
}

template <class F>
void each_cell(uintptr_t address, size_t bytes, bool writes, const void* code, const F& f) {
  const uintptr_t end = address + bytes;
  while (address < end) {
    Granule& g = granule_at(address);
    if (running->overlaps && g.written + 1 == stamp)
      fail("a race: thread " + std::to_string(running->thread) + " accesses at " + place(code) +
           " what the previous launch has written, without waiting for it");
    if (writes) g.written = stamp;
    const uintptr_t next = address / 4 * 4 + 4;
    if (!g.split && (address % 4 || next > end)) {
      if (!g.bytes) g.bytes = std::make_unique<std::array<Cell, 4>>();
      g.bytes->fill(g.whole);
      g.split = true;
    }
    if (!g.split) {
      f(g.whole, g.shared);
    } else {
      for (uintptr_t b = address; b < std::min(next, end); ++b) f((*g.bytes)[b % 4], g.shared);
    }
    address = next;
  }
}

}  // namespace

void begin_launch() {
  if (pages.size() > kMostPages) pages.clear();
  last_number = ~uintptr_t(0);
  ++stamp;
  releases.clear();
}

void fresh(const void* memory, size_t bytes, bool shared) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t a = begin; a < begin + bytes; a += 4) {
    Granule& g = granule_at(a);
    g.shared = shared;
    g.split = false;
    g.whole = Cell{};
    g.written = 0;
  }
}

void access(const void* memory, size_t bytes, Kind kind, const void* code) {
  const char* p = static_cast<const char*>(memory);
  if (!running || (p >= running->stack && p < running->stack_end)) return;
  each_cell(reinterpret_cast<uintptr_t>(p), bytes, kind != Kind::read, code,
            [&](Cell& cell, bool shared) { visit(cell, shared, kind, code); });
}

void copy_starts(void* to, const void* from, unsigned bytes, unsigned size, const void* code) {
  if (!running) return;
  if (bytes) access(from, bytes, Kind::read, code);
  each_cell(reinterpret_cast<uintptr_t>(to), size, true, code, [&](Cell& cell, bool shared) {
    visit(cell, shared, Kind::write, code);
    cell.write.pending = true;
  });
}

void copy_ends(void* to, unsigned size, const void* code) {
  if (!running) return;
  each_cell(reinterpret_cast<uintptr_t>(to), size, true, code,
            [&](Cell& cell, bool) { cell.write = mine(false, code); });
}

void release(const int32_t* flag, const void* code) {
  if (!running) return;
  access(flag, sizeof *flag, Kind::atomic, code);
  releases[flag] = {running->thread / running->block_size, running->block_barriers};
}

void acquire(const int32_t* flag, const void* code) {
  if (!running) return;
  access(flag, sizeof *flag, Kind::atomic, code);
  const auto found = releases.find(flag);
  if (found == releases.end()) return;  // set before the launch
  running->acquired->push_back({found->second.block, found->second.barriers, running->thread, running->block_barriers});
}

}  // namespace cuda_emulation::races

// ---------------------------------------------------------------------------------------------- hooks

using cuda_emulation::races::access;
using cuda_emulation::races::Kind;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define MUSTDROP_HOOKS(BYTES)                                                                                \
  void __tsan_read##BYTES(void* p) { access(p, BYTES, Kind::read, __builtin_return_address(0)); }            \
  void __tsan_write##BYTES(void* p) { access(p, BYTES, Kind::write, __builtin_return_address(0)); }          \
  void __tsan_volatile_read##BYTES(void* p) { access(p, BYTES, Kind::read, __builtin_return_address(0)); }   \
  void __tsan_volatile_write##BYTES(void* p) { access(p, BYTES, Kind::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##BYTES(void* p) { access(p, BYTES, Kind::read, __builtin_return_address(0)); }  \
  void __tsan_unaligned_write##BYTES(void* p) { access(p, BYTES, Kind::write, __builtin_return_address(0)); }
MUSTDROP_HOOKS(1)
MUSTDROP_HOOKS(2)
MUSTDROP_HOOKS(4)
MUSTDROP_HOOKS(8)
MUSTDROP_HOOKS(16)
#undef MUSTDROP_HOOKS
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, Kind::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, Kind::write, __builtin_return_address(0)); }

// Of the launchers' host code (reference counts); kernels use CUDA's atomics.
#define MUSTDROP_ATOMICS(BITS, TYPE)                                                                          \
  TYPE __tsan_atomic##BITS##_load(const volatile TYPE* p, int) { return __atomic_load_n(p, 5); }              \
  void __tsan_atomic##BITS##_store(volatile TYPE* p, TYPE v, int) { __atomic_store_n(p, v, 5); }              \
  TYPE __tsan_atomic##BITS##_exchange(volatile TYPE* p, TYPE v, int) { return __atomic_exchange_n(p, v, 5); } \
  TYPE __tsan_atomic##BITS##_fetch_add(volatile TYPE* p, TYPE v, int) { return __atomic_fetch_add(p, v, 5); } \
  TYPE __tsan_atomic##BITS##_fetch_sub(volatile TYPE* p, TYPE v, int) { return __atomic_fetch_sub(p, v, 5); } \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile TYPE* p, TYPE* c, TYPE v, int, int) {            \
    return __atomic_compare_exchange_n(p, c, v, false, 5, 5);                                                 \
  }                                                                                                           \
  int __tsan_atomic##BITS##_compare_exchange_weak(volatile TYPE* p, TYPE* c, TYPE v, int, int) {              \
    return __atomic_compare_exchange_n(p, c, v, true, 5, 5);                                                  \
  }
MUSTDROP_ATOMICS(8, uint8_t)
MUSTDROP_ATOMICS(32, uint32_t)
MUSTDROP_ATOMICS(64, uint64_t)
#undef MUSTDROP_ATOMICS
}
