// SPDX-License-Identifier: Apache-2.0
// cls_attention on the CPU, compiled per instruction set. With one query row per head it is bound by reading k once.
#include "attention_scores/cpu_kernel_cls.h"

#include "common/cpu_dot.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

constexpr float kHuge = 3.402823466e38f;

// Softmax of `n` scores in place. A row of -inf gives zeros.
void softmax(float* scores, int64_t n) {
  VecFloat maxima = splat(-kHuge), sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) maxima = larger(maxima, load(scores + i));
  float maximum = -kHuge;
  for (int lane = 0; lane < kLanes; ++lane) maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
  for (; i < n; ++i) maximum = scores[i] > maximum ? scores[i] : maximum;
  // Finite: neither a row of -inf nor one with +inf may subtract infinities.
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
void attend(const ClsParameters& p, int64_t b, int64_t head, float* query, float* scores) {
  const T* q = static_cast<const T*>(p.q) + b * p.q_batch + head * p.q_head;
  const T* k = static_cast<const T*>(p.k) + b * p.k_batch + head * p.k_head;
  for (int64_t d = 0; d < p.dim; ++d) query[d] = p.scale * to_float(q[d]);
  const int64_t columns = cls_columns(p, b);
  int64_t i = 0;
  for (; i + kDotRows <= columns; i += kDotRows) {
    const T* rows[kDotRows];
    for (int j = 0; j < kDotRows; ++j) rows[j] = k + (i + j) * p.k_row;
    dot_rows(query, rows, p.dim, scores + i, 1);
  }
  for (; i < columns; ++i) {
    const T* const row[1] = {k + i * p.k_row};
    dot_rows(query, row, p.dim, scores + i, 1);
  }
  softmax(scores, columns);
}

}  // namespace

void cls_softmax(const ClsTask& task, int64_t begin, int64_t end) {
  const ClsParameters& p = *task.parameters;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = p.first + item / p.heads, head = item % p.heads;
    float* scores = p.probabilities + item * p.span;
    with_element(p.element, [&](auto type) { attend<decltype(type)>(p, b, head, task.scratch, scores); });
  }
}

void cls_average(const ClsTask& task, int64_t begin, int64_t end) {
  const ClsParameters& p = *task.parameters;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = p.first + item, columns = cls_columns(p, b);
    const float* probabilities = p.probabilities + item * p.heads * p.span;
    float* out = p.out + b * p.span;
    for (int64_t head = 0; head < p.heads; ++head)
      for (int64_t i = p.prefix; i < columns; ++i) out[i] += probabilities[head * p.span + i];
    for (int64_t i = p.prefix; i < columns; ++i) out[i] /= static_cast<float>(p.heads);
  }
}

}  // namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL
