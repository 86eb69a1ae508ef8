// SPDX-License-Identifier: Apache-2.0
// Spreading independent items of work over torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "common/stable.h"

namespace mustdrop {

// How many threads are worth starting for `items` pieces of work of `cost` bytes each, where a thread should have at
// least `grain` bytes to do.
inline int64_t worker_count(int64_t items, int64_t cost, int64_t grain) {
  const int64_t items_each = std::max<int64_t>(1, grain / std::max<int64_t>(1, cost));
  return std::clamp<int64_t>(items / items_each, 1, torch::stable::get_num_threads());
}

// Calls work(worker) once for each worker, each on a thread of its own where torch has as many. `work` must not throw.
template <class Work>
void run_workers(int64_t workers, const Work& work) {
  if (workers == 1) return work(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

// Calls work(worker, begin, end) for ranges that cover [0, items). A worker goes through a part of its own, the same in every
// call of this size, so that what it has touched is in its caches; whoever is done helps the others. So items may differ in
// cost; what an item computes must not depend on its worker. `work` must not throw.
template <class Work>
void share_items(int64_t items, int64_t workers, const Work& work) {
  if (workers == 1) return work(0, 0, items);
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Part[]> parts(new Part[workers]);
  for (int64_t i = 0; i < workers; ++i) {
    parts[i].next = items * i / workers;
    parts[i].end = items * (i + 1) / workers;
  }
  const int64_t step = std::max<int64_t>(1, items / (workers * 16));
  run_workers(workers, [&](int64_t worker) {
    for (int64_t i = 0; i < workers; ++i) {
      Part& part = parts[(worker + i) % workers];
      for (int64_t begin; (begin = part.next.fetch_add(step)) < part.end;)
        work(worker, begin, std::min(begin + step, part.end));
    }
  });
}

}  // namespace mustdrop
