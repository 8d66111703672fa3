// Attention of few queries over many rows: every byte of K and V is read once, straight from the pages.
//
// Work is the list of all (sequence, KV head, block), cut into equal stretches of rows, one a thread. A thread keeps
// the running maximum, sum and weighted values of the queries of one KV head (online softmax, Milakov and Gimelshein
// 2018). Where a stretch begins or ends inside a head, what it has goes into a slot, and slots are merged at the end.
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

// Query m of a KV head: the tokens of its first query head come first.
inline Query query_of(const AttentionArguments& a, int head, int m) {
  return {m % a.n_new, std::ptrdiff_t{head} * a.group + m / a.n_new};
}

// A call, seen from one thread.
template <typename K, typename V>
class Decoding {
 public:
  Decoding(const AttentionArguments& a, float* memory)
      : a_(a),
        m_(a.group * a.n_new),
        k_stride_(padded(a.pages.k_dim)),
        v_stride_(padded(a.pages.v_dim)),
        queries_(memory),
        scores_(queries_ + m_ * k_stride_),
        decay_(scores_ + std::ptrdiff_t{m_} * kTileRows),
        state_(State::at(decay_ + padded(m_), m_)) {}

  static std::ptrdiff_t floats(const AttentionArguments& a) {
    const std::ptrdiff_t m = std::ptrdiff_t{a.group} * a.n_new;
    return m * padded(a.pages.k_dim) + m * kTileRows + padded(m) + State::floats(m, a.pages.v_dim);
  }

  const State& state() const { return state_; }

  Query query(int m) const { return query_of(a_, head_, m); }

  void begin(int sequence, int head) {
    sequence_ = sequence;
    head_ = head;
    for (int m = 0; m < m_; ++m) load_query(a_, sequence, query(m), queries_ + m * k_stride_);
    fill(state_.top, m_, kMinusInfinity);
    fill(state_.sum, m_, 0.0f);
    fill(state_.values, m_ * v_stride_, 0.0f);
  }

  // Attend to rows [from, to) of the sequence, which lie in block `block`. With `more`, the next block comes next.
  void attend(int block, int from, int to, bool more) {
    const char* bytes = block_bytes(a_.pages, sequence_, block);
    const K* keys = keys_in<K>(a_.pages, bytes, head_);
    const V* values = values_in<V>(a_.pages, bytes, head_);
    const char* next = more ? block_bytes(a_.pages, sequence_, block + 1) + head_ * a_.pages.k_page_bytes : nullptr;
    const Sight sight(a_, sequence_);
    for (int row = from; row < to; row += kTileRows) {
      const int n = smaller(kTileRows, to - row);
      const std::ptrdiff_t in_page = row - std::ptrdiff_t{block} * a_.pages.block_tokens;
      const K* tile = keys + in_page * a_.pages.k_dim;
      const char* following = row + n < to ? reinterpret_cast<const char*>(tile + std::ptrdiff_t{n} * a_.pages.k_dim) : next;
      attend_tile(sight, tile, values + in_page * a_.pages.v_dim, row, n, following);
    }
  }

 private:
  void attend_tile(const Sight& sight, const K* keys, const V* values, int row, int n, const char* next) {
    const Ahead to_values{reinterpret_cast<const char*>(values), a_.pages.v_dim * std::ptrdiff_t{sizeof(V)}};
    const Ahead to_keys{next, a_.pages.k_dim * std::ptrdiff_t{sizeof(K)}};
    in_fours(m_, [&](int m, auto count) {
      score_rows<K, decltype(count)::value>(keys, n, a_.pages.k_dim, queries_ + m * k_stride_, k_stride_,
                                            scores_ + std::ptrdiff_t{m} * kTileRows, m == 0 ? to_values : Ahead{});
    });
    for (int m = 0; m < m_; ++m) {
      float* scores = scores_ + std::ptrdiff_t{m} * kTileRows;
      sight.shape(query(m), row, n, scores);
      decay_[m] = soften(scores, n, state_.top[m], state_.sum[m]);
    }
    in_fours(m_, [&](int m, auto count) {
      add_values<V, decltype(count)::value>(values, n, a_.pages.v_dim, scores_ + std::ptrdiff_t{m} * kTileRows, decay_ + m,
                             state_.values + m * v_stride_, v_stride_, m == 0 ? to_keys : Ahead{});
    });
  }

  const AttentionArguments& a_;
  int m_;
  std::ptrdiff_t k_stride_, v_stride_;
  float *queries_, *scores_, *decay_;
  State state_;
  int sequence_ = 0, head_ = 0;
};

// Writes what the queries of one KV head have gathered.
inline void finish(const AttentionArguments& a, const State& state, int sequence, int head) {
  for (int m = 0; m < a.group * a.n_new; ++m) {
    finish(a, sequence, query_of(a, head, m), state.top[m], state.sum[m], state.values + m * padded(a.pages.v_dim));
  }
}

// A stretch of one head's rows that a thread attended to without having them all.
struct Slot {
  int sequence = -1, head = -1;
  State state{};
};

template <typename K, typename V>
void decode_typed(const AttentionArguments& a) {
  const int m = a.group * a.n_new;
  const std::ptrdiff_t a_thread = Decoding<K, V>::floats(a) + 2 * State::floats(m, a.pages.v_dim);
  std::int64_t total = 0;
  for (int s = 0; s < a.n_sequences; ++s) total += std::int64_t{a.pages.n_heads} * (a.rows.counts[s] - a.rows.skips[s]);
  const int n_threads = static_cast<int>(larger<std::int64_t>(1, smaller<std::int64_t>(a.n_threads, total / 256)));
  Slot* const slots = reinterpret_cast<Slot*>(a.scratch + a.n_threads * a_thread);
  const int n_slots = 2 * n_threads;
  for (int i = 0; i < n_slots; ++i) slots[i] = Slot{};
  in_parallel(n_threads, [&](int thread) {
    float* memory = a.scratch + thread * a_thread;
    Decoding<K, V> decoding(a, memory);
    float* slot_memory = memory + Decoding<K, V>::floats(a);
    Slot* slot = slots + 2 * thread;
    const std::int64_t begin = total * thread / n_threads, end = total * (thread + 1) / n_threads;
    std::int64_t at = 0;  // rows of the heads before
    for (int s = 0; s < a.n_sequences; ++s) {
      const int skip = a.rows.skips[s], count = a.rows.counts[s] - skip;
      for (int h = 0; h < a.pages.n_heads; ++h, at += count) {
        const int from = static_cast<int>(between<std::int64_t>(begin - at, 0, count));
        const int to = static_cast<int>(between<std::int64_t>(end - at, 0, count));
        if (count == 0 && thread == 0) {
          decoding.begin(s, h);
          finish(a, decoding.state(), s, h);
        }
        if (from >= to) continue;
        decoding.begin(s, h);
        for (int row = skip + from; row < skip + to;) {
          const int block = row / a.pages.block_tokens;
          const int stop = smaller((block + 1) * a.pages.block_tokens, skip + to);
          decoding.attend(block, row, stop, stop < skip + to);
          row = stop;
        }
        if (from == 0 && to == count) {
          finish(a, decoding.state(), s, h);
          continue;
        }
        slot->sequence = s;
        slot->head = h;
        slot->state = State::at(slot_memory, m);
        copy(decoding.state().top, State::floats(m, a.pages.v_dim), slot_memory);
        slot_memory += State::floats(m, a.pages.v_dim);
        ++slot;
      }
    }
  });
  for (int i = 0; i < n_slots; ++i) {  // slots of one head follow one another
    if (slots[i].sequence < 0) continue;
    int next = i + 1;
    for (; next < n_slots; ++next) {
      if (slots[next].sequence < 0) continue;
      if (slots[next].sequence != slots[i].sequence || slots[next].head != slots[i].head) break;
      merge(slots[i].state, slots[next].state, m, padded(a.pages.v_dim));
    }
    finish(a, slots[i].state, slots[i].sequence, slots[i].head);
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
  const std::ptrdiff_t m = std::ptrdiff_t{a.group} * a.n_new;
  const std::ptrdiff_t slots = 2 * sizeof(Slot) / sizeof(float);
  return a.n_threads * (Decoding<float, float>::floats(a) + 2 * State::floats(m, a.pages.v_dim) + slots);
}

}  // namespace stratakv::STRATAKV_ISA
