// SPDX-License-Identifier: Apache-2.0
#include "attention_scores/cpu_plan.h"

#include <algorithm>
#include <memory>

#include "common/token_types.h"
#include "common/workers.h"

namespace mustdrop {
namespace {

using cpu::kChunk;
using cpu::kLaneStep;
using cpu::ScoreParameters;
using cpu::ScoreTask;

constexpr int64_t kWorkspaceFloats = 1 << 20;  // target size: 4 MiB, about two cores' L2 caches
constexpr int64_t kMaxRows = 128;              // of a job
constexpr int64_t kMaxLanes = 1024;            // of a job: a chunk's weights stay in the cache
constexpr int64_t kGrain = 1 << 18;            // least multiplications per thread

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t chunks_of(int64_t keys) { return (keys + kChunk - 1) / kChunk; }

// The query rows of one sequence and the keys that the last of them attends to.
struct Contents {
  std::vector<int64_t> row_offset, lse_offset;
  std::vector<int32_t> row_position;
  std::vector<int64_t> vision_offset, text_offset;
  std::vector<int32_t> vision_position, text_position;
};

Contents read_types(const ScoreInputs& inputs, const ScoreSequence& sequence) {
  Contents contents;
  const auto exists = [&](int64_t p) {
    if (!inputs.page_size) return true;
    const int64_t block = sequence.table[p / inputs.page_size];
    return block >= 0 && block < inputs.blocks;
  };
  const int64_t first = sequence.length - sequence.rows;
  for (int64_t p = std::max<int64_t>(first, 0); p < sequence.length; ++p) {
    if (sequence.types[p] != kQueryToken || !exists(p)) continue;
    if (static_cast<int64_t>(contents.row_position.size()) == sequence.max_rows) break;
    contents.row_position.push_back(static_cast<int32_t>(p));
    contents.row_offset.push_back(sequence.q_begin + (p - first) * inputs.q_row);
    contents.lse_offset.push_back(sequence.lse_begin + (p - first) * inputs.lse_row);
  }
  const int64_t end = contents.row_position.empty() ? 0 : contents.row_position.back() + 1;
  for (int64_t p = 0; p < end; ++p) {
    const bool vision = sequence.types[p] == kVisionToken;
    if (sequence.types[p] == kPaddingToken || (inputs.lse && !vision) || !exists(p)) continue;
    const int64_t offset =
        inputs.page_size ? sequence.table[p / inputs.page_size] * inputs.k_block + p % inputs.page_size * inputs.k_row
                         : sequence.k_begin + p * inputs.k_row;
    (vision ? contents.vision_offset : contents.text_offset).push_back(offset);
    (vision ? contents.vision_position : contents.text_position).push_back(static_cast<int32_t>(p));
  }
  return contents;
}

// The parameters of a job and the memory that they point to.
struct Job {
  ScoreParameters parameters;
  const ScoreSequence* sequence;
  std::shared_ptr<const Contents> contents;
  std::vector<int32_t> row_position, lane_position;
};

// Sizes of a job's workspace in floats, in memory order.
struct Sizes {
  int64_t query, lane_lse, stats, weights, mean;

  explicit Sizes(const ScoreParameters& p) {
    const int64_t vision = p.vision_chunks * kChunk;
    query = p.kv_heads * p.dim * p.lane_stride;
    lane_lse = p.lse ? p.kv_heads * p.lane_stride : 0;
    stats = p.lse ? 0 : p.block_heads * (p.vision_chunks + p.text_chunks) * 2 * p.lane_stride + kLaneStep;
    weights = p.lse ? 0 : p.block_heads * vision * p.lane_stride + kLaneStep;
    mean = vision * p.row_stride;
  }
  int64_t sum() const { return round_up(query + lane_lse + stats + weights + mean, kLaneStep); }
};

void place(ScoreParameters& p, float* workspace) {
  const Sizes sizes(p);
  p.query = workspace;
  p.lane_lse = p.query + sizes.query;
  p.stats = p.lane_lse + sizes.lane_lse;
  p.weights = p.stats + sizes.stats;
  p.mean = p.weights + sizes.weights;
}

// Rows of a job: as many as the workspace holds for one key head, but enough to fill a vector.
int64_t rows_of_job(int64_t rows, int64_t group, int64_t vision) {
  int64_t most = std::min(kMaxRows, std::max<int64_t>(1, kMaxLanes / group));
  while (most * group > kLaneStep && most > 1 && vision * (group + 1) * most > kWorkspaceFloats) most /= 2;
  const int64_t jobs = (rows + most - 1) / most;
  return (rows + jobs - 1) / jobs;
}

Job plan_job(const ScoreInputs& inputs, const ScoreSequence& sequence, std::shared_ptr<const Contents> contents,
             int64_t first_row, int64_t rows) {
  Job job{{}, &sequence, contents, {}, {}};
  ScoreParameters& p = job.parameters;
  const Contents& from = *contents;
  p.heads = inputs.heads, p.kv_heads = inputs.kv_heads, p.dim = inputs.dim;
  p.group = inputs.heads / inputs.kv_heads;
  p.rows = rows, p.row_stride = round_up(rows, kLaneStep);
  p.lanes = p.group * rows, p.lane_stride = round_up(p.lanes, kLaneStep);
  p.scale = inputs.scale, p.element = inputs.element;
  p.paired = cpu::level() >= cpu::Level::avx512_bf16 && inputs.element == cpu::Element::bf16 && inputs.k_dim == 1 &&
             inputs.dim % 2 == 0;
  p.tiled = p.paired && cpu::level() == cpu::Level::amx_bf16 && inputs.dim % cpu::kTileDim == 0;
  p.q = inputs.q, p.q_head = inputs.q_head;
  p.k = inputs.k, p.k_head = inputs.k_head, p.k_dim = inputs.k_dim;
  p.lse = inputs.lse, p.lse_head = inputs.lse_head;
  p.row_offset = from.row_offset.data() + first_row;
  p.lse_offset = from.lse_offset.data() + first_row;
  p.first_position = from.row_position[first_row];

  const int32_t last = from.row_position[first_row + rows - 1];
  const auto seen = [last](const std::vector<int32_t>& keys) {
    return std::upper_bound(keys.begin(), keys.end(), last) - keys.begin();
  };
  p.vision = seen(from.vision_position), p.text = seen(from.text_position);
  p.vision_chunks = chunks_of(p.vision), p.text_chunks = chunks_of(p.text);
  p.vision_offset = from.vision_offset.data(), p.vision_position = from.vision_position.data();
  p.text_offset = from.text_offset.data(), p.text_position = from.text_position.data();

  job.row_position.assign(p.row_stride, -1);
  std::copy_n(from.row_position.begin() + first_row, rows, job.row_position.begin());
  job.lane_position.assign(p.lane_stride, -1);
  for (int64_t lane = 0; lane < p.lanes; ++lane) job.lane_position[lane] = job.row_position[lane % rows];
  p.row_position = job.row_position.data(), p.lane_position = job.lane_position.data();

  p.block_heads = 1;
  const int64_t fixed = Sizes(p).mean, one_head = p.vision_chunks * kChunk * p.lane_stride;
  p.block_heads = std::clamp((kWorkspaceFloats - fixed) / std::max<int64_t>(1, one_head), int64_t{1}, p.kv_heads);

  p.total = sequence.total, p.peak = sequence.peak;
  p.map = sequence.map ? sequence.map + first_row * sequence.map_stride : nullptr;
  p.map_stride = sequence.map_stride;
  return job;
}

// Jobs of different sequences that are computed together; a single job if its heads need several rounds.
class Batch {
 public:
  explicit Batch(const Tensor& like) : like_(like) {}

  void add(Job job) {
    const int64_t floats = Sizes(job.parameters).sum();
    const bool whole = job.parameters.block_heads == job.parameters.kv_heads;
    const bool fits = jobs_.empty() || (whole_ && whole && floats_ + floats <= kWorkspaceFloats &&
                                        jobs_.back()->sequence != job.sequence);
    if (!fits) run();
    whole_ = whole;
    floats_ += floats;
    jobs_.push_back(std::make_unique<Job>(std::move(job)));
  }

  void run() {
    if (jobs_.empty()) return;
    prepare();
    const ScoreParameters& first = jobs_.front()->parameters;
    const auto chunks = [](const ScoreParameters& p) { return p.vision_chunks + p.text_chunks; };
    phase(
        cpu::pack_query, [](const ScoreParameters& p) { return p.kv_heads; },
        [](const ScoreParameters& p) { return 4 * p.dim * p.lanes; });
    if (first.lse) {
      phase(
          cpu::score_normalized, [](const ScoreParameters& p) { return p.vision_chunks; },
          [](const ScoreParameters& p) { return p.kv_heads * kChunk * p.dim * p.lane_stride; });
    } else {
      for (int64_t head = 0, block = first.block_heads; head < first.kv_heads; head += block) {
        for (auto& job : jobs_) {
          job->parameters.first_head = head;
          job->parameters.block_heads = std::min(block, first.kv_heads - head);
        }
        phase(
            cpu::score_chunks, [&](const ScoreParameters& p) { return p.block_heads * chunks(p); },
            [](const ScoreParameters& p) { return kChunk * (p.dim + 16) * p.lane_stride; });
        phase(
            cpu::normalize, [](const ScoreParameters& p) { return p.block_heads * (p.lane_stride / kLaneStep); },
            [&](const ScoreParameters& p) { return 64 * chunks(p) * kLaneStep; });
        phase(
            cpu::average_heads, [](const ScoreParameters& p) { return p.vision_chunks; },
            [](const ScoreParameters& p) { return 4 * p.block_heads * kChunk * p.lane_stride; });
      }
    }
    jobs_.clear();
    floats_ = 0;
  }

 private:
  void prepare() {
    int64_t scratch = 0;
    for (auto& job : jobs_) scratch = std::max(scratch, round_up(scratch_floats(job->parameters), kLaneStep));
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t floats = floats_ + threads * scratch;
    if (floats > capacity_) {
      memory_ = new_empty(like_, {floats}, ScalarType::Float);
      capacity_ = floats;
    }
    float* next = mutable_data<float>(*memory_);
    scratch_.clear();
    for (int64_t t = 0; t < threads; ++t, next += scratch) scratch_.push_back(next);
    for (auto& job : jobs_) {
      place(job->parameters, next);
      next += Sizes(job->parameters).sum();
    }
  }

  // Runs one kernel over the items of all jobs.
  template <class Items, class Cost>
  void phase(void (*kernel)(const ScoreTask&, int64_t, int64_t), const Items& items_of, const Cost& cost_of) {
    int64_t items = 0, cost = 0;
    for (auto& job : jobs_) {
      items += items_of(job->parameters);
      cost += items_of(job->parameters) * cost_of(job->parameters);
    }
    if (items == 0) return;
    const int64_t workers = std::min<int64_t>(worker_count(items, cost / items, kGrain), scratch_.size());
    share_items(items, workers, [&](int64_t worker, int64_t begin, int64_t end) {
      for (auto& job : jobs_) {
        const int64_t count = items_of(job->parameters);
        if (begin < count && end > 0)
          kernel({&job->parameters, scratch_[worker]}, std::max<int64_t>(begin, 0), std::min(end, count));
        begin -= count, end -= count;
      }
    });
  }

  Tensor like_;
  std::vector<std::unique_ptr<Job>> jobs_;
  bool whole_ = true;  // all heads of the jobs are computed in one round
  int64_t floats_ = 0;
  std::optional<Tensor> memory_;
  int64_t capacity_ = 0;
  std::vector<float*> scratch_;
};

}  // namespace

void run_scores(const ScoreInputs& inputs, const std::vector<ScoreSequence>& sequences, const Tensor& like) {
  if (inputs.heads == 0) return;
  Batch batch(like);
  for (const ScoreSequence& sequence : sequences) {
    if (sequence.overwrites && sequence.total) {
      batch.run();
      std::fill_n(sequence.total, sequence.length, 0.0f);
      std::fill_n(sequence.peak, sequence.length, 0.0f);
    }
    const auto contents = std::make_shared<const Contents>(read_types(inputs, sequence));
    const int64_t rows = contents->row_position.size(), vision = contents->vision_position.size();
    if (rows == 0 || vision == 0) continue;
    const int64_t step = rows_of_job(rows, inputs.heads / inputs.kv_heads, vision);
    for (int64_t first = 0; first < rows; first += step) {
      Job job = plan_job(inputs, sequence, contents, first, std::min(step, rows - first));
      if (job.parameters.vision > 0) batch.add(std::move(job));
    }
  }
  batch.run();
}

}  // namespace mustdrop
