// Attention of few queries over many rows: every byte of K and V is read once, straight from the pages.
//
// Work is the list of all rows of all sequences, cut into equal stretches, one a thread. A thread takes all KV heads of
// some rows before it goes on, so that it reads memory in few lines: processors fetch ahead of those, and of little else.
// It keeps the running maximum, sum and weighted values of all queries of one sequence (online softmax, Milakov and
// Gimelshein 2018). Where a stretch begins or ends inside a sequence, what it has goes into a slot, and slots are merged
// at the end.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/reading.inl"
#include "attention/sight.inl"
#include "attention/state.inl"
#include "attention/tiles.inl"
#include "isa/small.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// A thread is worth its start for so many rows of one KV head.
constexpr int kLeastRows = 256;

// The blocks of a tile take turns by so many rows where that is faster. Processors fetch some 20 lines ahead of each line
// of reading, and those with wide registers compute so fast that one line is not enough: two give them twice as many.
constexpr int kTurn = 8;
constexpr bool kTakesTurns = Vec::kWidth >= 16;

// Query i of a sequence.
inline Query query_of(const AttentionArguments& a, int i) { return {i % a.n_new, i / a.n_new}; }

// A call, seen from one thread. Its queries are ordered by KV head, then query head, then token.
template <typename K, typename V>
class Decoding {
 public:
  Decoding(const AttentionArguments& a, float* memory)
      : a_(a),
        n_(queries_in(a)),
        k_stride_(padded(a.pages.k_dim)),
        v_stride_(padded(a.pages.v_dim)),
        read_bytes_(a.pages.n_heads * (a.pages.k_page_bytes + a.pages.v_page_bytes)),
        queries_(memory),
        scores_(queries_ + n_ * k_stride_),
        decay_(scores_ + std::ptrdiff_t{n_} * kTileRows),
        state_(State::at(decay_ + padded(n_), n_)) {}

  static int queries_in(const AttentionArguments& a) { return a.pages.n_heads * a.group * a.n_new; }

  static std::ptrdiff_t floats(const AttentionArguments& a) {
    const std::ptrdiff_t n = queries_in(a);
    return n * padded(a.pages.k_dim) + n * kTileRows + padded(n) + State::floats(n, a.pages.v_dim);
  }

  const State& state() const { return state_; }

  void begin(int sequence) {
    sequence_ = sequence;
    for (int i = 0; i < n_; ++i) {
      load_query(a_, sequence, query_of(a_, i), queries_ + i * k_stride_);
      arrange<K>(queries_ + i * k_stride_, a_.pages.k_dim);
    }
    fill(state_.top, n_, kMinusInfinity);
    fill(state_.sum, n_, 0.0f);
    fill(state_.values, n_ * v_stride_, 0.0f);
  }

  // Attend to the rows [from, to) of the sequence, at most kTileRows. All keys of a block lie before its values, and all
  // pages are read in that order.
  void attend(int from, int to) {
    const int m = a_.group * a_.n_new, n = to - from;
    each_page(from, to, [&](const Stretch& rows, int head) {
      const K* keys = keys_in<K>(a_.pages, rows.bytes, head) + std::ptrdiff_t{rows.in_page} * a_.pages.k_dim;
      in_fours(m, [&](int i, auto count) {
        const std::ptrdiff_t query = std::ptrdiff_t{head} * m + i;
        score_rows<K, decltype(count)::value>(keys, rows.n, a_.pages.k_dim, queries_ + query * k_stride_, k_stride_,
                                              scores_ + query * kTileRows + rows.at, i == 0 ? ahead(rows, keys) : nullptr);
      });
    });
    const Sight sight(a_, sequence_);
    for (int i = 0; i < n_; ++i) {
      float* scores = scores_ + std::ptrdiff_t{i} * kTileRows;
      sight.shape(query_of(a_, i), from, n, scores);
      decay_[i] = soften(scores, n, state_.top[i], state_.sum[i]);
    }
    each_page(from, to, [&](const Stretch& rows, int head) {
      const V* values = values_in<V>(a_.pages, rows.bytes, head) + std::ptrdiff_t{rows.in_page} * a_.pages.v_dim;
      in_fours(m, [&](int i, auto count) {
        const std::ptrdiff_t query = std::ptrdiff_t{head} * m + i;
        add_values<V, decltype(count)::value>(values, rows.n, a_.pages.v_dim, scores_ + query * kTileRows + rows.at, decay_ + query,
                                              state_.values + query * v_stride_, v_stride_, i == 0 ? ahead(rows, values) : nullptr);
        for (int j = 0; j < decltype(count)::value; ++j) decay_[query + j] = 1.0f;  // the tile's other rows add to this
      });
    });
  }

  // All rows were attended to.
  void end() {
    for (int i = 0; i < n_; ++i) settle<V>(state_.values + i * v_stride_, a_.pages.v_dim);
  }

 private:
  // Rows of one block that lie in a tile.
  struct Stretch {
    const char* bytes;  // of the block
    const char* next;   // of that which is read when this one ends
    int in_page, at, n;  // the first row in the page and in the tile, and how many there are

    Stretch turn(int row, int most) const { return {bytes, next, in_page + row, at + row, smaller(most, n - row)}; }
  };

  // What is wanted kPagesAhead bytes after a place in a block: blocks are read from their first byte to their last.
  const char* ahead(const Stretch& rows, const void* place) const {
    const std::ptrdiff_t wanted = static_cast<const char*>(place) - rows.bytes + kPagesAhead, behind = wanted - read_bytes_;
    return behind < 0 ? rows.bytes + wanted : rows.next + behind;
  }

  // function(stretch, head) for the rows [from, to).
  template <typename Function>
  void each_page(int from, int to, const Function& function) const {
    constexpr int kMost = kTileRows / kTurn + 1;
    const int span = a_.pages.block_tokens;
    Stretch stretches[kMost];
    const bool takes_turns = kTakesTurns && span >= kTurn;
    int n = 0, most = 0;
    const int last = (a_.rows.counts[sequence_] - 1) / span, later = takes_turns ? (kTileRows + span - 1) / span : 1;
    for (int row = from; row < to;) {
      const int block = row / span;
      const Stretch next{block_bytes(a_.pages, sequence_, block), block_bytes(a_.pages, sequence_, smaller(block + later, last)),
                         row % span, row - from, smaller(span - row % span, to - row)};
      row += next.n;
      most = larger(most, next.n);
      if (takes_turns) stretches[n++] = next;
      else for (int head = 0; head < a_.pages.n_heads; ++head) function(next, head);
    }
    const int turn = n == 1 ? kTileRows : kTurn;
    for (int head = 0; head < a_.pages.n_heads && n > 0; ++head) {
      for (int row = 0; row < most; row += turn) {
        for (int i = 0; i < n; ++i) {
          if (row < stretches[i].n) function(stretches[i].turn(row, turn), head);
        }
      }
    }
  }

  const AttentionArguments& a_;
  int n_;
  std::ptrdiff_t k_stride_, v_stride_, read_bytes_;
  float *queries_, *scores_, *decay_;
  State state_;
  int sequence_ = 0;
};

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

template <typename K, typename V>
void decode_typed(const AttentionArguments& a) {
  const int n_queries = Decoding<K, V>::queries_in(a);
  const std::ptrdiff_t state_floats = State::floats(n_queries, a.pages.v_dim);
  const std::ptrdiff_t a_thread = Decoding<K, V>::floats(a) + 2 * state_floats;
  std::int64_t total = 0;
  for (int s = 0; s < a.n_sequences; ++s) total += a.rows.counts[s] - a.rows.skips[s];
  const int n_threads = static_cast<int>(between<std::int64_t>(total * a.pages.n_heads / kLeastRows, 1, a.n_threads));
  Slot* const slots = reinterpret_cast<Slot*>(a.scratch + a.n_threads * a_thread);
  const int n_slots = 2 * n_threads;
  for (int i = 0; i < n_slots; ++i) slots[i] = Slot{};
  in_parallel(n_threads, [&](int thread) {
    float* memory = a.scratch + thread * a_thread;
    Decoding<K, V> decoding(a, memory);
    float* slot_memory = memory + Decoding<K, V>::floats(a);
    Slot* slot = slots + 2 * thread;
    const std::int64_t begin = total * thread / n_threads, end = total * (thread + 1) / n_threads;
    std::int64_t at = 0;  // rows of the sequences before
    for (int s = 0; s < a.n_sequences; ++s) {
      const int skip = a.rows.skips[s], count = a.rows.counts[s] - skip;
      const int from = static_cast<int>(between<std::int64_t>(begin - at, 0, count));
      const int to = static_cast<int>(between<std::int64_t>(end - at, 0, count));
      at += count;
      if (from >= to && (count > 0 || thread > 0)) continue;
      decoding.begin(s);
      for (int row = skip + from; row < skip + to; row += kTileRows) decoding.attend(row, smaller(row + kTileRows, skip + to));
      decoding.end();
      if (from == 0 && to == count) {
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

template <typename K>
void decode_keys(const AttentionArguments& a) {
  switch (a.pages.v_type) {
    case NumberType::kFloat: decode_typed<K, float>(a); break;
    case NumberType::kBFloat: decode_typed<K, BFloat>(a); break;
    case NumberType::kHalf: decode_typed<K, Half>(a); break;
  }
}

inline void decode(const AttentionArguments& a) {
  switch (a.pages.k_type) {
    case NumberType::kFloat: decode_keys<float>(a); break;
    case NumberType::kBFloat: decode_keys<BFloat>(a); break;
    case NumberType::kHalf: decode_keys<Half>(a); break;
  }
}

inline std::ptrdiff_t decode_floats(const AttentionArguments& a) {
  const std::ptrdiff_t slots = 2 * sizeof(Slot) / sizeof(float);
  const std::ptrdiff_t states = 2 * State::floats(Decoding<float, float>::queries_in(a), a.pages.v_dim);
  return a.n_threads * (Decoding<float, float>::floats(a) + states + slots);
}

}  // namespace stratakv::STRATAKV_ISA
