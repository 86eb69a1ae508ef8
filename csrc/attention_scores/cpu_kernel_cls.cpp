// SPDX-License-Identifier: Apache-2.0
// cls_attention on the CPU, compiled per instruction set: one query row a head, so it is a matter of reading k once.
#include "attention_scores/cpu_kernel_cls.h"

#include "common/cpu_math.h"

namespace mustdrop::cpu::MUSTDROP_CPU_LEVEL {
namespace {

constexpr int kKeys = 4;  // keys whose products are computed side by side

constexpr float kHuge = 3.402823466e38f;

// scores[i] = q . k_i for N keys.
template <int N, class T>
inline void dot_keys(const float* q,           // [dim]
                     const T* k, int64_t row,  // [N, dim], stride of keys
                     int64_t dim, float* scores) {
  VecFloat sums[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sums[i] = VecFloat{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const VecFloat x = load(q + d);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sums[i] += x * load(k + i * row + d);
  }
  if (d < dim) {
    const VecFloat x = load_part(q + d, dim - d);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sums[i] += x * load_part(k + i * row + d, dim - d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) scores[i] = sum_of(sums[i]);
}

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
  for (; i + kKeys <= columns; i += kKeys) dot_keys<kKeys>(query, k + i * job.k_row, job.k_row, job.dim, scores + i);
  for (; i < columns; ++i) dot_keys<1>(query, k + i * job.k_row, job.k_row, job.dim, scores + i);
  softmax(scores, columns);
}

}  // namespace

void cls_softmax(const ClsTask& task, int64_t begin, int64_t end) {
  const ClsJob& job = *task.job;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = job.first + item / job.heads, head = item % job.heads;
    float* scores = job.probabilities + item * job.span;
    switch (job.element) {
      case Element::f32: attend<float>(job, b, head, task.scratch, scores); break;
      case Element::f16: attend<half>(job, b, head, task.scratch, scores); break;
      case Element::bf16: attend<bfloat16>(job, b, head, task.scratch, scores); break;
    }
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
