// What queries have gathered from the rows so far (online softmax), its merge and its end.
#pragma once

#include <cmath>
#include <cstddef>

#include "attention/arguments.h"
#include "attention/sight.inl"
#include "isa/exponential.h"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

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

// Scores of one query become weights, and its maximum and sum move on. Returns the share that is left of what it has
// gathered before. `scores` has room for whole registers.
inline float soften(float* scores, int n, float& top, float& sum) {
  for (int r = n; r % Vec::kWidth != 0; ++r) scores[r] = kMinusInfinity;
  Vec largest = Vec::all(kMinusInfinity);
  for (int r = 0; r < n; r += Vec::kWidth) largest = Vec::max(largest, Vec::load(scores + r));
  const float old = top, now = larger(old, largest.largest());
  if (now == kMinusInfinity) {  // nothing seen so far, or nothing that is a number
    for (int r = 0; r < n; ++r) {
      if (scores[r] != scores[r]) {
        sum = scores[r];
        top = 0.0f;
      }
    }
    fill(scores, n, 0.0f);
    return 1.0f;
  }
  const float decay = old == now ? 1.0f : old == kMinusInfinity ? 0.0f : std::exp(old - now);
  Vec added = Vec::zero();
  for (int r = 0; r < n; r += Vec::kWidth) {
    const Vec weight = exponential(Vec::load(scores + r) - Vec::all(now));
    weight.store(scores + r);
    added = added + weight;
  }
  sum = sum * decay + added.sum();
  top = now;
  return decay;
}

template <typename O>
inline void finish(const AttentionArguments& a, int sequence, Query query, float top, float sum, const float* values) {
  const float lse = sum > 0 ? top + std::log(sum) : sum == 0 ? kMinusInfinity : sum;
  a.lse.data[sequence * a.lse.sequence_stride + query.head * a.lse.head_stride + query.token * a.lse.token_stride] = lse;
  float share = sum == 0 ? 0.0f : 1.0f / sum;
  if (a.rules.head_sinks != nullptr && sum != 0) share *= 1.0f / (1.0f + std::exp(a.rules.head_sinks[query.head] - lse));
  O* out = static_cast<O*>(a.out.data) + sequence * a.out.sequence_stride + query.head * a.out.head_stride + query.token * a.out.token_stride;
  for (int d = 0; d < a.pages.v_dim; d += Vec::kWidth) {
    store_up_to(Vec::load(values + d) * Vec::all(share), out + d, a.pages.v_dim - d);
  }
}

// Writes the output and log-sum-exp of one query.
inline void finish(const AttentionArguments& a, int sequence, Query query, float top, float sum, const float* values) {
  switch (a.writes_floats ? NumberType::kFloat : a.query_type) {
    case NumberType::kBFloat: finish<BFloat>(a, sequence, query, top, sum, values); break;
    case NumberType::kHalf: finish<Half>(a, sequence, query, top, sum, values); break;
    default: finish<float>(a, sequence, query, top, sum, values); break;
  }
}

}  // namespace stratakv::STRATAKV_ISA
