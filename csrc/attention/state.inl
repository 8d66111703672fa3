// What queries have gathered from the rows so far (online softmax), its merge and its end.
#pragma once

#include <cmath>
#include <cstddef>

#include "attention/arguments.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

constexpr float kMinusInfinity = -__builtin_inff();

// The sum, maximum and values of `m` queries.
struct State {
  float* top;      // [m]
  float* sum;      // [m]
  float* values;   // [m, padded(v_dim)]

  static std::ptrdiff_t floats(std::ptrdiff_t m, std::ptrdiff_t v_dim) { return 2 * padded(m) + m * padded(v_dim); }
  static State at(float* memory, std::ptrdiff_t m) { return {memory, memory + padded(m), memory + 2 * padded(m)}; }
};

// Into `to` goes what `from` has: both saw rows of the same queries.
inline void merge(const State& to, const State& from, int m, std::ptrdiff_t v_stride) {
  for (int i = 0; i < m; ++i) {
    const float top = larger(to.top[i], from.top[i]);
    if (top == kMinusInfinity) continue;
    const float mine = std::exp(to.top[i] - top), theirs = std::exp(from.top[i] - top);
    to.sum[i] = to.sum[i] * mine + from.sum[i] * theirs;
    to.top[i] = top;
    float* a = to.values + i * v_stride;
    const float* b = from.values + i * v_stride;
    for (std::ptrdiff_t d = 0; d < v_stride; d += Vec::kWidth) {
      Vec::fma(Vec::load(a + d), Vec::all(mine), Vec::load(b + d) * Vec::all(theirs)).store(a + d);
    }
  }
}

template <typename O>
inline void finish(const AttentionArguments& a, const State& state, int sequence, int head) {
  const std::ptrdiff_t v_stride = padded(a.pages.v_dim);
  for (int m = 0; m < a.group * a.n_new; ++m) {
    const std::ptrdiff_t q_head = std::ptrdiff_t{head} * a.group + m / a.n_new, token = m % a.n_new;
    const float lse = state.sum[m] > 0 ? state.top[m] + std::log(state.sum[m]) : state.sum[m] == 0 ? kMinusInfinity : state.sum[m];
    a.lse.data[sequence * a.lse.sequence_stride + q_head * a.lse.head_stride + token * a.lse.token_stride] = lse;
    float share = state.sum[m] == 0 ? 0.0f : 1.0f / state.sum[m];
    if (a.rules.head_sinks != nullptr) share *= 1.0f / (1.0f + std::exp(a.rules.head_sinks[q_head] - lse));
    O* out = static_cast<O*>(a.out.data) + sequence * a.out.sequence_stride + q_head * a.out.head_stride + token * a.out.token_stride;
    for (int d = 0; d < a.pages.v_dim; d += Vec::kWidth) {
      const Vec value = Vec::load(state.values + m * v_stride + d) * Vec::all(share);
      const int n = smaller(Vec::kWidth, a.pages.v_dim - d);
      if (n == Vec::kWidth) value.store(out + d); else value.store_some(out + d, n);
    }
  }
}

inline void finish(const AttentionArguments& a, const State& state, int sequence, int head) {
  switch (a.query_type) {
    case NumberType::kFloat: finish<float>(a, state, sequence, head); break;
    case NumberType::kBFloat: finish<BFloat>(a, state, sequence, head); break;
    case NumberType::kHalf: finish<Half>(a, state, sequence, head); break;
  }
}

}  // namespace stratakv::STRATAKV_ISA
