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

inline void attend(const AttentionArguments& a) { is_prompt(a) ? prefill(a) : decode(a); }

inline std::ptrdiff_t attend_floats(const AttentionArguments& a) { return is_prompt(a) ? prefill_floats(a) : decode_floats(a); }

}  // namespace stratakv::STRATAKV_ISA
