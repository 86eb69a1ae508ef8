// SPDX-License-Identifier: Apache-2.0
// Distributes independent work items over torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "common/stable.h"

namespace mustdrop {

// Number of threads for `items` work items of `cost` bytes each, with at least `grain` bytes per thread.
inline int64_t worker_count(int64_t items, int64_t cost, int64_t grain) {
  const int64_t items_each = std::max<int64_t>(1, grain / std::max<int64_t>(1, cost));
  return std::clamp<int64_t>(items / items_each, 1, torch::stable::get_num_threads());
}

// Calls work(worker) once for each worker, in parallel. `work` must not throw.
template <class Work>
void run_workers(int64_t workers, const Work& work) {
  if (workers == 1) return work(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

// Calls work(worker, begin, end) for ranges that cover [0, items). Each worker begins with a part of its own, the same
// in every call of this size, which its caches may hold; then it steals from the others, so items may differ in cost.
// Results must not depend on the worker. `work` must not throw.
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
