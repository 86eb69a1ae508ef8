// SPDX-License-Identifier: Apache-2.0
// Runs two real kernels for many seeds and says how often the result is wrong. The tests compile this against the headers
// as they are, and against copies with a barrier or a bound taken out.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "common/device.cuh"
#include "compact_kv/kernel.cuh"
#include "gather/kernel.cuh"

namespace {

using namespace mustdrop;

// One layer, one head, rows of 16 bytes: keys and values of exactly `length` rows.
bool compaction_is_right(unsigned seed) {
  std::mt19937 random(seed);
  const int64_t length = 2300;
  std::vector<int64_t> keep;
  for (int64_t i = 0; i < length; ++i)
    if (random() % 4) keep.push_back(i);
  const int32_t count = static_cast<int32_t>(keep.size());
  std::vector<uint4> caches[2] = {std::vector<uint4>(length), std::vector<uint4>(length)};
  for (auto& cache : caches)
    for (uint4& row : cache) row = {static_cast<unsigned>(random()), static_cast<unsigned>(random()), 0, 0};
  const auto before = caches[0];

  CompactParameters<1> p{};
  p.heads = p.columns = p.splits = 1;
  CompactLayer& layer = p.layers[0];
  for (int i = 0; i < 2; ++i) layer.cache[i] = {reinterpret_cast<char*>(caches[i].data()), 0, 0, 16, 16, 16, 16};
  layer.set = {keep.data(), &count, count, 0, 0, 0, 0};
  layer.length = length;
  layer.heads = 1;
  cuda_emulation::run({dim3(1, 2, 1), dim3(kCompactThreads), 1, kCompactChunk * sizeof(CompactMove)},
                      [&] { compact_kernel<uint4, 1>(p); });
  for (int32_t i = 0; i < count; ++i)
    if (caches[0][i].x != before[keep[i]].x || caches[0][i].y != before[keep[i]].y) return false;
  return true;
}

bool gathering_is_right(unsigned seed) {
  std::mt19937 random(seed);
  const int64_t length = 40, capacity = 7, pieces = 5;
  std::vector<uint4> x(length * pieces), out(capacity * pieces);
  for (uint4& piece : x) piece.x = static_cast<unsigned>(random());
  std::vector<int64_t> keep;
  for (int64_t i = 0; i < capacity; ++i) keep.push_back(static_cast<int64_t>(random() % length));
  const int32_t count = capacity;
  GatherParameters p{};
  p.x = reinterpret_cast<const char*>(x.data());
  p.keep = keep.data();
  p.counts = &count;
  p.out = reinterpret_cast<char*>(out.data());
  p.length = length;
  p.capacity = p.tokens = capacity;
  p.row_stride = p.run = pieces * 16;
  p.pieces = pieces;
  p.group = 8;
  cuda_emulation::run({dim3(1), dim3(kGatherThreads), 1, 0}, [&] { gather_kernel<uint4, true>(p); });
  for (int64_t i = 0; i < capacity; ++i)
    for (int64_t j = 0; j < pieces; ++j)
      if (out[i * pieces + j].x != x[keep[i] * pieces + j].x) return false;
  return true;
}

// Kernels that break a rule of CUDA: the emulation has to say so.
void rule(const std::string& name) {
  const auto launch = [](unsigned threads, unsigned cluster, const std::function<void()>& kernel) {
    cuda_emulation::run({dim3(cluster), dim3(threads), cluster, 64}, kernel);
  };
  if (name == "divergent")  // half of a warp votes, the other half is at a shuffle
    launch(32, 1, [] { threadIdx.x < 16 ? void(__ballot_sync(~0u, 1)) : void(__shfl_sync(~0u, 1, 0)); });
  if (name == "left") launch(64, 1, [] { if (threadIdx.x != 3) __syncthreads(); });
  if (name == "unwaited") launch(32, 1, [] { cuda_emulation::copy_later(cuda_emulation::here().shared, "0123456789abcdef", 16, 16); });
  if (name == "rank") launch(32, 2, [] { cuda_emulation::cluster_shared(cuda_emulation::here().shared, 2); });
  if (name == "shared") launch(32, 1, [] { cuda_emulation::here().shared[64 + threadIdx.x] = 1; });
}

}  // namespace

extern "C" void cuda_emulation_configure(unsigned seed, int capability);

// mutants compact|gather SEEDS: prints how many were wrong. mutants RULE: ends with the emulation's message.
int main(int argc, char** argv) try {
  const std::string name = argv[1];
  if (argc < 3) {
    rule(name);
    return 0;
  }
  int wrong = 0;
  const unsigned seeds = static_cast<unsigned>(std::atoi(argv[2]));
  for (unsigned seed = 0; seed < seeds; ++seed) {
    cuda_emulation_configure(seed, 90);
    wrong += !(name == "compact" ? compaction_is_right(seed) : gathering_is_right(seed));
  }
  std::printf("%d\n", wrong);
} catch (const std::runtime_error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
