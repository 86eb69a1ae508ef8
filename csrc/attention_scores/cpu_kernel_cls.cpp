// SPDX-License-Identifier: Apache-2.0
// cls_attention on the CPU, compiled per instruction set: one query row a head, so it is a matter of reading k once.
#include "attention_scores/cpu_kernel_cls.h"

#include "common/cpu_dot.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

constexpr float kHuge = 3.402823466e38f;

// The softmax of `n` scores in place. A row of -inf gives zeros.
void softmax(float* scores, int64_t n) {
  VecFloat maxima = splat(-kHuge), sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) maxima = larger(maxima, load(scores + i));
  float maximum = -kHuge;
  for (int lane = 0; lane < kLanes; ++lane) maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
  for (; i < n; ++i) maximum = scores[i] > maximum ? scores[i] : maximum;
  // Finite, so that neither a row of -inf nor one with +inf subtracts infinities.
  maximum = maximum > kHuge ? kHuge : maximum;

  for (i = 0; i + kLanes <= n; i += kLanes) {
    const VecFloat e = exp_of(load(scores + i) - maximum);
    sums += e;
    store(scores + i, e);
  }
  float rest = 0.0f;
  if (i < n) {
    const VecFloat e = exp_of(load_part(scores + i, n - i) - maximum);
    for (int64_t j = i; j < n; ++j) rest += scores[j] = e[j - i];
  }
  const float sum = sum_of(sums) + rest;
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (i = 0; i < n; ++i) scores[i] *= factor;
}

template <class T>
void attend(const ClsJob& job, int64_t b, int64_t head, float* query, float* scores) {
  const T* q = static_cast<const T*>(job.q) + b * job.q_batch + head * job.q_head;
  const T* k = static_cast<const T*>(job.k) + b * job.k_batch + head * job.k_head;
  for (int64_t d = 0; d < job.dim; ++d) query[d] = job.scale * to_float(q[d]);
  const int64_t columns = cls_columns(job, b);
  int64_t i = 0;
  for (; i + kDotRows <= columns; i += kDotRows) {
    const T* rows[kDotRows];
    for (int j = 0; j < kDotRows; ++j) rows[j] = k + (i + j) * job.k_row;
    dot_rows(query, rows, job.dim, scores + i, 1);
  }
  for (; i < columns; ++i) {
    const T* const row[1] = {k + i * job.k_row};
    dot_rows(query, row, job.dim, scores + i, 1);
  }
  softmax(scores, columns);
}

}  // namespace

void cls_softmax(const ClsTask& task, int64_t begin, int64_t end) {
  const ClsJob& job = *task.job;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = job.first + item / job.heads, head = item % job.heads;
    float* scores = job.probabilities + item * job.span;
    with_element(job.element, [&](auto type) { attend<decltype(type)>(job, b, head, task.scratch, scores); });
  }
}

void cls_average(const ClsTask& task, int64_t begin, int64_t end) {
  const ClsJob& job = *task.job;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = job.first + item, columns = cls_columns(job, b);
    const float* probabilities = job.probabilities + item * job.heads * job.span;
    float* out = job.out + b * job.span;
    for (int64_t head = 0; head < job.heads; ++head)
      for (int64_t i = job.prefix; i < columns; ++i) out[i] += probabilities[head * job.span + i];
    for (int64_t i = job.prefix; i < columns; ++i) out[i] /= static_cast<float>(job.heads);
  }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
