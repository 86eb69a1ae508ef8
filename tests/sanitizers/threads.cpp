// SPDX-License-Identifier: Apache-2.0
// Calls every CPU operator from several threads at once, each with worker threads of its own, on shared inputs; results
// must equal those of a single thread. Built with ThreadSanitizer (test_threads.py). With an argument, two threads do
// each range of work: a race that the sanitizer must report.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <thread>
#include <tuple>

#include "common/stable.h"
#include "common/token_types.h"

namespace torch::stable {

static bool planted = false;
static std::atomic<uint32_t> workers{1};

uint32_t get_num_threads() { return workers; }

void parallel_for(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& work) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i)
    for (int copies = planted ? 2 : 1; copies > 0; --copies) threads.emplace_back(work, i, i + 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

namespace {

using namespace mustdrop;
using Bytes = std::vector<std::vector<char>>;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Opt = const OptionalTensor&;
using In = const Tensor&;

uint32_t state = 1;

uint32_t random_bits() {  // xorshift
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

Tensor normal(std::vector<int64_t> shape, ScalarType type = ScalarType::Float) {
  Tensor t(shape, type);
  for (int64_t i = 0; i < t.numel(); ++i) {
    const float value = static_cast<float>(random_bits() % 2001) / 500.0f - 2.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == ScalarType::Float) t.data<float>()[i] = value;
    if (type == ScalarType::BFloat16) t.data<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    if (type == ScalarType::Half) t.data<uint16_t>()[i] = static_cast<uint16_t>(0x3800 + random_bits() % 1024);
  }
  return t;
}

template <class T>
Tensor whole(std::vector<int64_t> shape, ScalarType type, const std::function<T(int64_t)>& value) {
  Tensor t(shape, type);
  for (int64_t i = 0; i < t.numel(); ++i) t.data<T>()[i] = value(i);
  return t;
}

Tensor ints(std::vector<int64_t> shape, const std::function<int32_t(int64_t)>& value) {
  return whole<int32_t>(shape, ScalarType::Int, value);
}

Tensor types(int64_t batch, int64_t length) {  // padding, text, vision tokens, a query
  return whole<uint8_t>({batch, length}, ScalarType::Byte, [=](int64_t i) {
    const int64_t j = i % length;
    return j < 3 ? kPaddingToken : j < 20 ? kTextToken : j < length - 25 ? kVisionToken : kQueryToken;
  });
}

template <class Signature>
Signature* op(const char* name) {
  return std::any_cast<Signature*>(torch::stable::registered().at(name));
}

std::vector<char> bytes_of(In t) {
  const char* data = t.data<char>();
  return {data, data + t.numel() * static_cast<int64_t>(t.element_size())};
}

Bytes bytes(const Two& two) { return {bytes_of(std::get<0>(two)), bytes_of(std::get<1>(two))}; }
Bytes bytes(const Four& f) {
  return {bytes_of(std::get<0>(f)), bytes_of(std::get<1>(f)), bytes_of(std::get<2>(f)), bytes_of(std::get<3>(f))};
}

// Calls of every operator, large enough for several workers. All callers share the inputs.
std::vector<std::function<Bytes()>> calls() {
  constexpr int64_t B = 3, L = 300, D = 64;
  std::vector<std::function<Bytes()>> all;
  for (const ScalarType type : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    const Tensor x = normal({B, 1 + 24 * 24, 96}, type), q = normal({B, 8, L, D}, type), k = normal({B, 4, L, D}, type);
    const Tensor kinds = types(B, L), cls_q = normal({B, 8, D}, type), cls_k = normal({B, 8, 577, D}, type);
    const Tensor lse = ints({B, 8, L}, [](int64_t) { return 0x40800000; });  // 4.0f
    Tensor lse_float({B, 8, L}, ScalarType::Float);
    std::memcpy(lse_float.data<char>(), lse.data<char>(), lse.numel() * 4);
    using Merge = Four(In, std::vector<int64_t>, std::vector<int64_t>, double, OptionalInt, bool, int64_t, Opt, bool);
    for (const bool uniform : {false, true})
      all.push_back(
          [=] { return bytes(op<Merge>("spatial_merge")(x, {24, 24}, {3, 3}, 0.0, {}, uniform, 1, {}, uniform)); });
    all.push_back([=] {
      return Bytes{bytes_of(op<Tensor(In, In, double, Opt, int64_t)>("cls_attention")(cls_q, cls_k, 0.125, {}, 1))};
    });
    for (const OptionalTensor& given : {OptionalTensor{}, OptionalTensor{lse_float}}) {
      all.push_back(
          [=] { return bytes(op<Two(In, In, In, double, Opt)>("text_vision_scores")(q, k, kinds, 0.125, given)); });
      all.push_back([=] {
        using Map = Tensor(In, In, In, double, int64_t, Opt);
        return Bytes{bytes_of(op<Map>("text_vision_attention")(q, k, kinds, 0.125, 30, given))};
      });
    }
    using Dual = Four(In, In, In, double, double, double, Opt, Opt, OptionalInt, int64_t);
    using TopK = Four(In, In, In, double, int64_t, Opt, Opt, Opt, OptionalInt, int64_t);
    all.push_back(
        [=] { return bytes(op<Dual>("dual_attention_select")(q, k, kinds, 0.125, 0.004, 0.004, {}, {}, {}, 16)); });
    all.push_back([=] { return bytes(op<TopK>("topk_attention_select")(q, k, kinds, 0.125, 64, {}, {}, {}, {}, 1)); });
    const Tensor flat_q = normal({2 * L, 8, D}, type), flat_k = normal({2 * L, 4, D}, type);
    const Tensor cu = ints({3}, [=](int64_t i) { return static_cast<int32_t>(i * L); });
    Tensor flat_kinds = whole<uint8_t>({2 * L}, ScalarType::Byte, [&](int64_t i) { return kinds.data<uint8_t>()[i]; });
    using Varlen = Two(In, In, In, In, In, int64_t, int64_t, double, Opt);
    all.push_back([=] {
      return bytes(
          op<Varlen>("text_vision_scores_varlen")(flat_q, flat_k, flat_kinds, cu, cu, L, L, 0.125, OptionalTensor{}));
    });
    const Tensor cache = normal({60, 16, 4, D}, type);
    const Tensor table = ints({2, 19}, [](int64_t i) { return static_cast<int32_t>((7 * i) % 60); });
    const Tensor lengths = ints({2}, [](int64_t i) { return static_cast<int32_t>(300 - 20 * i); });
    const Tensor two_kinds = types(2, L);
    using Paged = Two(In, In, In, In, In, In, int64_t, double, Opt);
    all.push_back([=] {
      return bytes(op<Paged>("text_vision_scores_paged")(flat_q, cache, table, lengths, two_kinds, cu, L, 0.125, {}));
    });
  }
  const Tensor scores = normal({64, 3000}), peaks = normal({64, 3000}), kinds = types(64, 3000);
  using SelectDual = Two(In, In, In, double, double, Opt, OptionalInt, int64_t);
  using SelectTopK = Two(In, In, int64_t, Opt, Opt, OptionalInt, int64_t);
  all.push_back([=] { return bytes(op<SelectDual>("select_dual")(scores, peaks, kinds, 0.1, 0.5, {}, {}, 16)); });
  all.push_back([=] { return bytes(op<SelectTopK>("select_topk")(scores, kinds, 500, {}, {}, {}, 16)); });

  constexpr int64_t kept = 200;
  const Tensor keep = whole<int64_t>({B, kept}, ScalarType::Long, [](int64_t i) { return i % kept + (i % kept) / 2; });
  const Tensor counts = ints({B}, [](int64_t) { return kept; });
  const Tensor hidden = normal({B, L, 512});
  all.push_back(
      [=] { return Bytes{bytes_of(op<Tensor(In, In, In, bool)>("gather_tokens")(hidden, keep, counts, true))}; });
  const Tensor key = normal({B, L, 8, D}), value = normal({B, 8, L, D});
  const Tensor pages = normal({60, 16, 4, D});
  const Tensor own = ints({2, 19}, [](int64_t i) { return static_cast<int32_t>(i); });
  const Tensor lengths = ints({2}, [](int64_t) { return 300; });
  const Tensor two = whole<int64_t>({2, kept}, ScalarType::Long, [](int64_t i) { return i % kept + (i % kept) / 2; });
  const Tensor two_counts = ints({2}, [](int64_t) { return kept; });
  for (const bool align_end : {false, true}) {
    all.push_back([=] {
      const Tensor k = key.clone().transpose(1, 2), v = value.clone();
      using Compact = void(const Tensors&, const Tensors&, const Tensors&, const Tensors&, bool);
      op<Compact>("compact_kv_")({k}, {v}, {keep}, {counts}, align_end);
      return Bytes{bytes_of(k), bytes_of(v)};
    });
    all.push_back([=] {
      const Tensor k = pages.clone(), v = pages.clone();
      using Compact = void(const Tensors&, const Tensors&, In, const Tensors&, const Tensors&, Opt, bool);
      op<Compact>("compact_paged_kv_")({k}, {v}, own, {two}, {two_counts}, lengths, align_end);
      return Bytes{bytes_of(k), bytes_of(v)};
    });
  }
  return all;
}

}  // namespace

int main(int argc, char**) {
  const auto all = calls();
  std::vector<Bytes> alone;
  for (const auto& call : all) alone.push_back(call());
  torch::stable::workers = 3;
  torch::stable::planted = argc > 1;
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < all.size(); ++i) {
        const size_t c = (i + 5 * caller) % all.size();
        if (all[c]() != alone[c]) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%zu calls, %d results differ\n", all.size(), wrong.load());
  return wrong != 0;
}
