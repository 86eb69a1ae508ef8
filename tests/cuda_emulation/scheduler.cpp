// SPDX-License-Identifier: Apache-2.0
// The scheduler of the CUDA emulation: fibers, barriers, warp operations, clusters, deferred copies.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda_emulation.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;     // of a fiber; only touched pages cost memory
constexpr unsigned kThreadsTogether = 2048;  // so that blocks that wait for each other run together
constexpr long kMostPauses = 20'000'000;     // of all threads without other progress: the wait never ends

struct Settings {
  unsigned seed = 0;
  int capability = 90;
  int multiprocessors = 4;
} settings;

// ---------------------------------------------------------------------------------------------- attributes of kernels

// The limit of each kernel's dynamic shared memory on each device.
class SharedLimits {
 public:
  void set(const void* kernel, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_[{device(), kernel}] = bytes;
  }
  size_t of(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bytes_.find({device(), kernel});
    return found == bytes_.end() ? size_t{48} << 10 : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, const void*>, size_t> bytes_;
} limits;

// ---------------------------------------------------------------------------------------------- stacks

// Reuses the stacks of fibers: a test runs tens of thousands of threads.
class Stacks {
 public:
  char* acquire() {
    if (free_.empty()) {
      void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("cuda_emulation: no memory for a stack");
      free_.push_back(static_cast<char*>(p));
    }
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void release(char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // frames that never returned
#endif
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
} stacks;

#if defined(__x86_64__)
// swapcontext makes two system calls; this switch makes none. A context is its stack pointer.
using Context = void*;
extern "C" void cuda_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_emulation_switch
.hidden cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
void switch_context(Context& save, Context& load) { cuda_emulation_switch(&save, load); }
void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the entry's return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------- threads and blocks

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, size;
};

struct Block;
struct Thread {
  Context context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  ThreadContext kernel_context{};
  Block* block = nullptr;
  unsigned linear = 0;
  unsigned phase = 0;  // of the cluster's barrier, at the last arrival
  races::ThreadState state;
  bool done = false;
  const char* waits_for = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> copies;              // not committed
};

// A warp operation in progress: the data of the lanes that have arrived.
struct Exchange {
  const char* what;
  unsigned mask, arrived = 0, left;
  size_t bytes;
  std::vector<char> data;
  Exchange(const char* w, unsigned m, size_t b)
      : what(w), mask(m), left(__builtin_popcount(m)), bytes(b), data(32 * b) {}
};

struct Cluster;
struct Block {
  Cluster* cluster = nullptr;
  std::unique_ptr<char, decltype(&std::free)> shared_memory{nullptr, &std::free};  // of exactly the requested size
  char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<std::vector<std::unique_ptr<Exchange>>> exchanges;  // per warp
  unsigned at_barrier = 0, left = 0;
  unsigned wanted = 0;  // waits at the cluster's barrier before this block may exit
  std::vector<races::Acquired> acquired;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned arrived = 0, phase = 0, left = 0;
};

class Launching {
 public:
  Launching(const Launch& launch, const std::function<void()>& kernel)
      : launch_(launch), kernel_(kernel), random_(settings.seed * 7919u + 1) {
    if (random_() % 2) unfair_ = random_() | 1u;
  }

  void run();
  void suspend(const char* why);  // of the running thread, until ready(thread)
  void ready(Thread* t) {
    t->waits_for = nullptr;
    ready_.push_back(t);
    pauses_ = 0;
  }
  void pause() {
    if (++pauses_ > kMostPauses) fail("a wait on memory that never ends");
    ready_.push_back(self);
    switch_out();
  }
  [[noreturn]] void stop(const std::string& what) {
    error_ = what;
    for (;;) switch_out();
  }
  void body() {
    enter_fiber();
    kernel_();
    self->done = true;
    for (;;) switch_out();
  }
  Thread* self = nullptr;

 private:
  size_t choose();
  void check_launch() const;
  void start_cluster(unsigned first);
  void start_thread(Block& block, unsigned linear, dim3 index, unsigned rank);
  void finish(Thread* t);
  void switch_in(Thread* t);
  void switch_out();
  void enter_fiber();
  std::string describe_waits() const;

  const Launch& launch_;
  const std::function<void()>& kernel_;
  std::mt19937 random_;
  std::vector<Thread*> ready_;
  std::map<Cluster*, std::unique_ptr<Cluster>> running_;
  Context scheduler_{};
  void* scheduler_fake_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::string error_;
  long pauses_ = 0;
  unsigned unfair_ = 0;  // 0: all threads are drawn with equal probability
};

// The launch that this host thread runs. Every access of a kernel reads it: the TLS model is for speed.
__attribute__((tls_model("initial-exec"))) thread_local Launching* current = nullptr;

void fiber_main() { current->body(); }

void Launching::enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

void Launching::switch_in(Thread* t) {
  self = t;
#if defined(MUSTDROP_FIND_RACES)
  races::running = &t->state;
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_, t->stack, kStackBytes);
#endif
  switch_context(scheduler_, t->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
  races::running = nullptr;
}

void Launching::switch_out() {
  Thread* t = self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&t->fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
  switch_context(t->context, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t->fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

void Launching::suspend(const char* why) {
  self->waits_for = why;
  switch_out();
}

void Launching::start_thread(Block& block, unsigned linear, dim3 index, unsigned rank) {
  Thread& t = block.threads[linear];
  const dim3 d = launch_.block;
  t.block = &block;
  t.linear = linear;
  t.stack = stacks.acquire();
  t.kernel_context = {dim3(linear % d.x, linear / d.x % d.y, linear / (d.x * d.y)),
                      index,
                      d,
                      launch_.grid,
                      rank,
                      launch_.cluster,
                      block.shared,
                      static_cast<unsigned>(launch_.shared_bytes)};
  const unsigned size = static_cast<unsigned>(block.threads.size());
  const unsigned linear_block = index.x + launch_.grid.x * (index.y + launch_.grid.y * index.z);
  t.state.thread = linear_block * size + linear;
  t.state.block_size = size;
  t.state.cluster_size = launch_.cluster;
  t.state.stack = t.stack;
  t.state.stack_end = t.stack + kStackBytes;
  t.state.acquired = &block.acquired;
  t.state.overlaps = launch_.overlaps;
  make_context(t.context, t.stack, fiber_main);
  ready(&t);
}

void Launching::start_cluster(unsigned first) {
  auto cluster = std::make_unique<Cluster>();
  const unsigned threads = launch_.block.x * launch_.block.y * launch_.block.z;
  const dim3 g = launch_.grid;
  cluster->left = threads * launch_.cluster;
  for (unsigned rank = 0; rank < launch_.cluster; ++rank) {
    const unsigned linear = first + rank;
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, launch_.shared_bytes)) throw std::bad_alloc();
    block->shared_memory.reset(static_cast<char*>(shared));
    block->shared = static_cast<char*>(shared);
    std::memset(block->shared, 0xFF, launch_.shared_bytes);
    races::fresh(block->shared, launch_.shared_bytes, true);
    block->threads = std::vector<Thread>(threads);
    block->exchanges.resize((threads + 31) / 32);
    block->left = threads;
    const dim3 index(linear % g.x, linear / g.x % g.y, linear / (g.x * g.y));
    for (unsigned i = 0; i < threads; ++i) start_thread(*block, i, index, rank);
    cluster->blocks.push_back(std::move(block));
  }
  Cluster* key = cluster.get();
  running_[key] = std::move(cluster);
}

void Launching::finish(Thread* t) {
  if (!t->groups.empty() || !t->copies.empty()) error_ = "a thread left with copies that it has not waited for";
  if (t->state.cluster_waits < t->block->wanted) error_ = "a block left while others may still use its shared memory";
  if (t->state.overlaps) error_ = "a thread left without waiting for the previous launch";
  stacks.release(t->stack);
  t->stack = nullptr;
  --t->block->left;
  Cluster* cluster = t->block->cluster;
  if (--cluster->left > 0) return;
  for (const auto& block : cluster->blocks) races::fresh(block->shared, launch_.shared_bytes, false);
  running_.erase(cluster);
}

std::string Launching::describe_waits() const {
  std::map<std::string, int> waits;
  int left = 0;
  for (const auto& [key, cluster] : running_)
    for (const auto& block : cluster->blocks)
      for (const Thread& t : block->threads)
        t.done ? void(++left) : void(++waits[t.waits_for ? t.waits_for : "nothing"]);
  std::string text = "threads that wait forever:";
  for (const auto& [what, n] : waits) text += " " + std::to_string(n) + " at " + what + ";";
  return text + " " + std::to_string(left) + " of their blocks have left";
}

// Draws the ready thread that runs next. In every second launch some warps are much faster than others: fair draws keep
// all threads close together, but bugs show when a thread is a barrier ahead of another.
size_t Launching::choose() {
  const auto draw = [this] { return random_() % ready_.size(); };
  size_t best = draw();
  if (!unfair_ || random_() % 4 == 0) return best;
  const auto speed = [this](size_t i) { return (ready_[i]->state.thread / 32 + 1) * 2654435761u ^ unfair_; };
  for (int i = 0; i < 8; ++i)
    if (const size_t other = draw(); speed(other) > speed(best)) best = other;
  return best;
}

// Refuses launches that a device refuses, and blocks of incomplete warps, which the emulation does not support.
void Launching::check_launch() const {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("cuda_emulation: a launch of " + what); };
  const dim3 g = launch_.grid, b = launch_.block;
  const uint64_t blocks = uint64_t(g.x) * g.y * g.z, threads = uint64_t(b.x) * b.y * b.z;
  if (blocks == 0 || threads == 0) refuse("nothing");
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 || threads > 1024) refuse("more than a grid or a block may have");
  if (threads % 32) refuse("incomplete warps");
  if (launch_.shared_bytes > static_cast<size_t>(shared_limit())) refuse("more shared memory than a block may have");
  if (launch_.shared_bytes > limits.of(launch_.kernel)) refuse("more shared memory than the kernel's attribute allows");
  if (launch_.cluster == 0 || launch_.cluster > 8 || g.x % launch_.cluster) refuse("a cluster that is not portable");
  if (launch_.cluster > 1 && capability() < 90) refuse("a cluster on a device that has none");
}

void Launching::run() {
  races::begin_launch();
  check_launch();
  std::vector<unsigned> order(launch_.grid.x * launch_.grid.y * launch_.grid.z / launch_.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * launch_.cluster;
  std::shuffle(order.begin(), order.end(), random_);
  const unsigned threads = launch_.block.x * launch_.block.y * launch_.block.z * launch_.cluster;
  const size_t together = 1 + random_() % std::max(3u, kThreadsTogether / threads);  // concurrent clusters
  size_t next = 0;
  while (error_.empty()) {
    while (next < order.size() && running_.size() < together) start_cluster(order[next++]);
    if (running_.empty()) break;
    if (ready_.empty()) {
      error_ = describe_waits();
      break;
    }
    const size_t pick = choose();
    Thread* t = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    switch_in(t);
    if (t->done) finish(t);
  }
  for (auto& [key, cluster] : running_)
    for (auto& block : cluster->blocks)
      for (Thread& t : block->threads)
        if (t.stack) stacks.release(t.stack);
  if (!error_.empty()) throw std::runtime_error("cuda_emulation: " + error_);
}

void do_copy(const Copy& c) {
  char* to = static_cast<char*>(c.to);
  if (c.bytes) std::memcpy(to, c.from, c.bytes);
  std::memset(to + c.bytes, 0, c.size - c.bytes);
}

}  // namespace

// ---------------------------------------------------------------------------------------------- interface of kernels

const ThreadContext& this_thread() { return current->self->kernel_context; }
int capability() { return settings.capability; }
int device() { return settings.capability - 80; }
int multiprocessors() { return settings.multiprocessors; }
int clusters_at_once(unsigned cluster) { return std::max(settings.multiprocessors / static_cast<int>(cluster), 1); }
int shared_limit() {
  switch (settings.capability / 10) {
    case 9:
    case 10:
      return 227 << 10;
    case 8:
      return (settings.capability == 80 ? 163 : 99) << 10;
    default:
      return 99 << 10;
  }
}
void fail(const std::string& what) { current->stop(what); }
void pause() { current->pause(); }

void set_shared_limit(const void* kernel, size_t bytes) {
  limits.set(kernel, bytes);
  std::this_thread::sleep_for(std::chrono::milliseconds(1));  // lets another thread run between this and the launch
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  if (current) throw std::runtime_error("cuda_emulation: a launch within a launch");
  static std::mutex device_is_busy;
  const std::lock_guard<std::mutex> lock(device_is_busy);
  Launching launching(launch, kernel);
  struct Guard {
    ~Guard() { current = nullptr; }
  } guard;
  current = &launching;
  launching.run();
}

void block_barrier() {
  Thread* t = current->self;
  Block& block = *t->block;
  if (block.left != block.threads.size()) fail("a thread left before others reached __syncthreads");
  if (++block.at_barrier == block.left) {
    block.at_barrier = 0;
    for (Thread& other : block.threads)
      if (&other != t) current->ready(&other);
    pause();
  } else {
    current->suspend("__syncthreads");
  }
  ++t->state.block_barriers;
}

void cluster_arrive(bool relaxed) {
  Cluster& cluster = *current->self->block->cluster;
  const unsigned threads = static_cast<unsigned>(cluster.blocks.size() * cluster.blocks[0]->threads.size());
  if (cluster.left != threads) fail("a thread left before others reached the cluster's barrier");
  current->self->phase = cluster.phase + 1;
  races::ThreadState& state = current->self->state;
  ++state.cluster_arrivals;
  state.publishes = !relaxed;
  if (!relaxed) ++state.cluster_releases;
  if (++cluster.arrived < threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (auto& block : cluster.blocks)
    for (Thread& t : block->threads)
      if (t.waits_for && std::strcmp(t.waits_for, "the cluster's barrier") == 0) current->ready(&t);
}

void cluster_wait() {
  Thread* t = current->self;
  if (t->block->cluster->phase < t->phase)
    current->suspend("the cluster's barrier");
  else
    pause();
  ++t->state.cluster_waits;
  if (t->state.publishes) ++t->state.cluster_acquires;
}

void wait_for_previous() { current->self->state.overlaps = false; }

char* cluster_shared(void* mine, unsigned rank) {
  const Block& block = *current->self->block;
  const ptrdiff_t offset = static_cast<char*>(mine) - block.shared;
  if (rank >= block.cluster->blocks.size()) fail("a rank outside the cluster");
  if (offset < 0 || offset > static_cast<ptrdiff_t>(this_thread().shared_bytes))
    fail("a cluster address outside shared memory");
  Block& other = *block.cluster->blocks[rank];
  const races::ThreadState& state = current->self->state;
  if (&other != &block) {
    if (state.cluster_waits == 0) fail("another block's shared memory before the cluster's first barrier");
    if (other.left < other.threads.size()) fail("the shared memory of a block whose threads have left");
    other.wanted = std::max(other.wanted, state.cluster_arrivals + 1);
  }
  return other.shared + offset;
}

void warp_exchange(const char* what, unsigned mask, const void* in, size_t bytes, void* out) {
  Thread& t = *current->self;
  const unsigned lane = t.linear & 31, bit = 1u << lane;
  if (!(mask & bit)) fail(std::string(what) + " by a lane that is not in its mask");
  auto& open = t.block->exchanges[t.linear / 32];
  Exchange* e = nullptr;
  for (auto& candidate : open) {
    if (candidate->arrived == candidate->mask || !(candidate->mask & mask)) continue;
    if (candidate->mask != mask || candidate->bytes != bytes || std::strcmp(candidate->what, what) != 0)
      fail(std::string("lanes of one warp are at different operations: ") + what + " and " + candidate->what);
    e = candidate.get();
  }
  if (!e) e = open.emplace_back(std::make_unique<Exchange>(what, mask, bytes)).get();
  std::memcpy(e->data.data() + lane * bytes, in, bytes);
  e->arrived |= bit;
  if (e->arrived == mask) {
    Thread* warp = &t.block->threads[t.linear & ~31u];
    for (unsigned i = 0; i < 32; ++i)
      if ((mask >> i & 1u) && i != lane) current->ready(warp + i);
  } else {
    current->suspend(what);
  }
  std::memcpy(out, e->data.data(), 32 * bytes);
  if (mask == ~0u && std::strcmp(what, "__syncwarp") == 0) ++t.state.warp_barriers;
  if (--e->left == 0) open.erase(std::find_if(open.begin(), open.end(), [&](const auto& x) { return x.get() == e; }));
}

void copy_later(void* to, const void* from, unsigned bytes, unsigned size) {
  races::copy_starts(to, from, bytes, size, __builtin_return_address(0));
  current->self->copies.push_back({to, from, bytes, size});
}

void atomic_access(const void* address, size_t bytes) {
  races::access(address, bytes, races::Kind::atomic, __builtin_return_address(0));
}

void publish(int32_t* flag) {
  pause();  // other threads may come first
  races::release(flag, __builtin_return_address(0));
  *flag = 1;
}

void wait_published(const int32_t* flag) {
  do pause();
  while (*flag == 0);
  races::acquire(flag, __builtin_return_address(0));
}

void copies_commit() {
  Thread& t = *current->self;
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void copies_wait(unsigned groups_left) {
  Thread& t = *current->self;
  for (; t.groups.size() > groups_left; t.groups.pop_front())
    for (const Copy& c : t.groups.front()) {
      do_copy(c);
      races::copy_ends(c.to, c.size, __builtin_return_address(0));
    }
}

}  // namespace cuda_emulation

extern "C" __attribute__((visibility("default"))) void cuda_emulation_configure(unsigned seed, int capability,
                                                                                int multiprocessors) {
  cuda_emulation::settings = {seed, capability, multiprocessors};
}
