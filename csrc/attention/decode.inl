// Attention of few queries over many rows: every byte of K and V is read once, straight from the pages.
//
// Work is the list of all rows of all sequences, cut into equal stretches, one a thread (decoding.inl). Where a stretch
// begins or ends inside a sequence, what it has goes into a slot, and slots are merged at the end.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/decoding.inl"
#include "attention/formats.inl"
#include "attention/state.inl"
#include "isa/small.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// A thread is worth its start for so many rows of one KV head.
constexpr int kLeastRows = 256;

// Writes what the queries of one sequence have gathered.
inline void finish(const AttentionArguments& a, const State& state, int sequence) {
  for (int i = 0; i < a.pages.n_heads * a.group * a.n_new; ++i) {
    finish(a, sequence, query_of(a, i), state.top[i], state.sum[i], state.values + i * padded(a.pages.v_dim));
  }
}

// A stretch of one sequence's rows that a thread attended to without having them all.
struct Slot {
  int sequence = -1;
  State state{};
};

// The rows of a sequence in one strand. They are shared out by their bytes.
struct Share {
  std::int64_t bytes;  // of a row
  int skip, count;

  static Share of(const AttentionArguments& a, int sequence) {
    const std::int64_t page = a.pages.k_page_bytes + a.pages.v_page_bytes;
    return {larger<std::int64_t>(page / a.pages.block_tokens, 1), a.rows.skips[sequence], a.rows.counts[sequence] - a.rows.skips[sequence]};
  }

  std::int64_t total() const { return bytes * count; }

  // The first row that belongs to whoever begins `at` bytes behind the share's first one: at the edge of a tile of rows.
  int row_at(std::int64_t at) const {
    const int row = static_cast<int>(between<std::int64_t>((at + bytes - 1) / bytes, 0, count));
    if (row == 0 || row == count) return row;
    return between((skip + row + kLanes - 1) / kLanes * kLanes - skip, 0, count);
  }
};

inline void decode(const AttentionArguments& a) {
  const int n_queries = Decoding::queries_in(a), n_strands = a.before != nullptr ? kStrands : 1;
  const std::ptrdiff_t state_floats = State::floats(n_queries, a.pages.v_dim);
  const std::ptrdiff_t a_thread = Decoding::floats(a) + 2 * state_floats;
  std::int64_t total = 0, n_rows = 0;
  for (int s = 0; s < a.n_sequences; ++s) {
    for (int i = 0; i < n_strands; ++i) {
      const Share share = Share::of(*strand(a, i), s);
      total += share.total();
      n_rows += share.count;
    }
  }
  const int n_threads = static_cast<int>(between<std::int64_t>(n_rows * a.pages.n_heads / kLeastRows, 1, a.n_threads));
  Slot* const slots = reinterpret_cast<Slot*>(a.scratch + a.n_threads * a_thread);
  const int n_slots = 2 * n_threads;
  for (int i = 0; i < n_slots; ++i) slots[i] = Slot{};
  in_parallel(n_threads, [&](int thread) {
    float* memory = a.scratch + thread * a_thread;
    Decoding decoding(a, memory);
    float* slot_memory = memory + Decoding::floats(a);
    Slot* slot = slots + 2 * thread;
    const std::int64_t begin = total * thread / n_threads, end = total * (thread + 1) / n_threads;
    std::int64_t at = 0;  // bytes of the sequences before
    for (int s = 0; s < a.n_sequences; ++s) {
      bool is_begun = false, is_whole = true;
      const bool is_empty = sequence_rows(a, s) == 0;
      for (int i = 0; i < n_strands; ++i) {
        const Share share = Share::of(*strand(a, i), s);
        const int from = share.row_at(begin - at), to = thread + 1 == n_threads ? share.count : share.row_at(end - at);
        at += share.total();
        is_whole = is_whole && from == 0 && to == share.count;
        if (from >= to) continue;
        if (!is_begun) decoding.begin(s);
        is_begun = true;
        decoding.attend(i, share.skip + from, share.skip + to);
      }
      if (!is_begun) {
        if (!is_empty || thread > 0) continue;
        decoding.begin(s);
      }
      decoding.end();
      if (is_whole) {
        finish(a, decoding.state(), s);
        continue;
      }
      slot->sequence = s;
      slot->state = State::at(slot_memory, n_queries);
      copy(decoding.state().top, state_floats, slot_memory);
      slot_memory += state_floats;
      ++slot;
    }
  });
  for (int i = 0; i < n_slots; ++i) {  // slots of one sequence follow one another
    if (slots[i].sequence < 0) continue;
    int next = i + 1;
    for (; next < n_slots; ++next) {
      if (slots[next].sequence < 0) continue;
      if (slots[next].sequence != slots[i].sequence) break;
      merge(slots[i].state, slots[next].state, n_queries, padded(a.pages.v_dim));
    }
    finish(a, slots[i].state, slots[i].sequence);
    i = next - 1;
  }
}

inline std::ptrdiff_t decode_floats(const AttentionArguments& a) {
  const std::ptrdiff_t slots = 2 * sizeof(Slot) / sizeof(float);
  const std::ptrdiff_t states = 2 * State::floats(Decoding::queries_in(a), a.pages.v_dim);
  return a.n_threads * (Decoding::floats(a) + states + slots);
}

}  // namespace stratakv::STRATAKV_ISA
