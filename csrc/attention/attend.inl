// The kernel for a call: prompts share what they widen, few queries read every byte once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/arguments.h"
#include "attention/decode.inl"
#include "attention/prefill.inl"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Prefill shares queries over the threads, decode rows; two shares a thread make up for their being unequal.
inline bool is_prompt(const AttentionArguments& a) {
  const std::int64_t n_heads = std::int64_t{a.n_sequences} * a.pages.n_heads;
  const std::int64_t shares = larger<std::int64_t>(n_heads, a.n_threads > 1 ? 2 * a.n_threads : 1);
  return n_heads * a.group * a.n_new >= a.prompt_queries * shares;
}

// The outputs of a prompt's queries over one strand of rows, and their log-sum-exp.
inline std::ptrdiff_t strand_floats(const AttentionArguments& a) {
  return std::ptrdiff_t{a.n_sequences} * a.pages.n_heads * a.group * a.n_new * (padded(a.pages.v_dim) + 1);
}

inline AttentionArguments for_strand(const AttentionArguments& a, float* out, float* scratch) {
  AttentionArguments own = a;
  const std::int64_t width = padded(a.pages.v_dim), n_heads = std::int64_t{a.pages.n_heads} * a.group;
  own.before = nullptr;
  own.rules.head_sinks = nullptr;  // once, for all rows
  own.out = {out, n_heads * a.n_new * width, a.n_new * width, width};
  own.writes_floats = true;
  own.lse = {out + n_heads * a.n_sequences * a.n_new * width, n_heads * a.n_new, a.n_new, 1};
  own.scratch = scratch;
  return own;
}

// A prompt over rows that lie in two places: over each alone, and then what both give becomes one.
inline void prefill_both(const AttentionArguments& a) {
  float* const first = a.scratch;
  float* const second = first + strand_floats(a);
  const AttentionArguments one = for_strand(*a.before, first, second + strand_floats(a));
  const AttentionArguments two = for_strand(a, second, second + strand_floats(a));
  prefill(one);
  prefill(two);
  const std::ptrdiff_t width = padded(a.pages.v_dim);
  for (int s = 0; s < a.n_sequences; ++s) {
    for (int i = 0; i < a.pages.n_heads * a.group * a.n_new; ++i) {
      const Query query = query_of(a, i);
      const std::ptrdiff_t at = s * one.lse.sequence_stride + query.head * one.lse.head_stride + query.token;
      const float x = one.lse.data[at], y = two.lse.data[at];
      const float top = x > y ? x : y != y ? y : x != x ? x : y;
      const float of_one = x == kMinusInfinity ? 0.0f : std::exp(x - top), of_two = y == kMinusInfinity ? 0.0f : std::exp(y - top);
      float *const values = first + at * width, *const others = second + at * width;
      for (int d = 0; d < a.pages.v_dim; ++d) values[d] = of_one * values[d] + of_two * others[d];
      finish(a, s, query, top == kMinusInfinity ? 0.0f : top, of_one + of_two, values);
    }
  }
}

inline void attend(const AttentionArguments& a) {
  if (!is_prompt(a)) return decode(a);
  a.before != nullptr ? prefill_both(a) : prefill(a);
}

inline std::ptrdiff_t attend_floats(const AttentionArguments& a) {
  if (!is_prompt(a)) return decode_floats(a);
  if (a.before == nullptr) return prefill_floats(a);
  return 2 * strand_floats(a) + larger(prefill_floats(a), prefill_floats(*a.before));
}

}  // namespace stratakv::STRATAKV_ISA
