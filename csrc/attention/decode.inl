// Attention of few queries over many rows: every byte of K and V is read once, straight from the pages.
//
// Work is the list of all (sequence, KV head, block), cut into equal stretches of rows, one a thread. A thread keeps
// the running maximum, sum and weighted values of the queries of one KV head (online softmax, Milakov and Gimelshein
// 2018). Where a stretch begins or ends inside a head, what it has goes into a slot, and slots are merged at the end.
#pragma once

#include <cmath>
#include <cstddef>

#include "attention/arguments.h"
#include "attention/state.inl"
#include "attention/tiles.inl"
#include "isa/exponential.h"
#include "isa/small.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// A quarter of the smallest float: models mark what is hidden with that number, or half of it.
constexpr float kHidden = -8.5e37f;

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

  void begin(int sequence, int head) {
    sequence_ = sequence;
    head_ = head;
    for (int m = 0; m < m_; ++m) load_query(m);
    fill(state_.top, m_, kMinusInfinity);
    fill(state_.sum, m_, 0.0f);
    fill(state_.values, m_ * v_stride_, 0.0f);
  }

  // Attend to rows [from, to) of the sequence, which lie in block `block`. With `more`, the next block comes next.
  void attend(int block, int from, int to, bool more) {
    const char* bytes = block_bytes(block);
    const K* keys = reinterpret_cast<const K*>(bytes + head_ * a_.pages.k_page_bytes);
    const char* next = more ? block_bytes(block + 1) + head_ * a_.pages.k_page_bytes : nullptr;
    const V* values = reinterpret_cast<const V*>(bytes + a_.pages.n_heads * a_.pages.k_page_bytes + head_ * a_.pages.v_page_bytes);
    for (int row = from; row < to; row += kTileRows) {
      const int n = smaller(kTileRows, to - row);
      const std::ptrdiff_t in_page = row - std::ptrdiff_t{block} * a_.pages.block_tokens;
      const K* tile = keys + in_page * a_.pages.k_dim;
      const char* following = row + n < to ? reinterpret_cast<const char*>(tile + std::ptrdiff_t{n} * a_.pages.k_dim) : next;
      attend_tile(tile, values + in_page * a_.pages.v_dim, row, n, following);
    }
  }

 private:
  const char* block_bytes(int block) const {
    const std::int32_t* place = a_.pages.table + sequence_ * a_.pages.table_stride + 2 * std::ptrdiff_t{block};
    return reinterpret_cast<const char*>(a_.pages.slabs[place[0]]) + place[1] * a_.pages.block_bytes;
  }

  void load_query(int m) {
    const std::ptrdiff_t head = std::ptrdiff_t{head_} * a_.group + m / a_.n_new;
    const std::ptrdiff_t at = sequence_ * a_.query.sequence_stride + head * a_.query.head_stride + (m % a_.n_new) * a_.query.token_stride;
    float* to = queries_ + m * k_stride_;
    switch (a_.query_type) {
      case NumberType::kFloat: copy(static_cast<const float*>(a_.query.data) + at, to); break;
      case NumberType::kBFloat: copy(static_cast<const BFloat*>(a_.query.data) + at, to); break;
      case NumberType::kHalf: copy(static_cast<const Half*>(a_.query.data) + at, to); break;
    }
  }

  template <typename Q>
  void copy(const Q* from, float* to) const {
    const Vec scale = Vec::all(a_.rules.scale);
    for (int d = 0; d < k_stride_; d += Vec::kWidth) {
      const int n = between(a_.pages.k_dim - d, 0, Vec::kWidth);
      (Vec::load_some(from + d, n) * scale).store(to + d);
    }
  }

  std::int32_t position_of(int row) const {
    if (a_.rows.positions != nullptr) return a_.rows.positions[row];
    return a_.rows.first_positions[sequence_] + row;
  }

  void attend_tile(const K* keys, const V* values, int row, int n, const char* next) {
    const Ahead to_values{reinterpret_cast<const char*>(values), a_.pages.v_dim * std::ptrdiff_t{sizeof(V)}};
    const Ahead to_keys{next, a_.pages.k_dim * std::ptrdiff_t{sizeof(K)}};
    in_fours(m_, [&](int m, auto count) {
      score_rows<K, decltype(count)::value>(keys, n, a_.pages.k_dim, queries_ + m * k_stride_, k_stride_,
                                            scores_ + std::ptrdiff_t{m} * kTileRows, m == 0 ? to_values : Ahead{});
    });
    for (int m = 0; m < m_; ++m) soften(m, row, n);
    in_fours(m_, [&](int m, auto count) {
      add_values<V, decltype(count)::value>(values, n, a_.pages.v_dim, scores_ + std::ptrdiff_t{m} * kTileRows, decay_ + m,
                             state_.values + m * v_stride_, v_stride_, m == 0 ? to_keys : Ahead{});
    });
  }

  // Scores of one query become weights, and its maximum and sum move on.
  void soften(int m, int row, int n) {
    float* scores = scores_ + std::ptrdiff_t{m} * kTileRows;
    shape(m, row, n, scores);
    for (int r = n; r % Vec::kWidth != 0; ++r) scores[r] = kMinusInfinity;
    Vec top = Vec::all(kMinusInfinity);
    for (int r = 0; r < n; r += Vec::kWidth) top = Vec::max(top, Vec::load(scores + r));
    const float old = state_.top[m];
    const float now = larger(old, top.largest());
    if (now == kMinusInfinity) {  // nothing seen so far, or nothing that is a number
      for (int r = 0; r < n; ++r) {
        if (scores[r] != scores[r]) {
          state_.sum[m] = scores[r];
          state_.top[m] = 0.0f;
        }
      }
      decay_[m] = 1.0f;
      fill(scores, n, 0.0f);
      return;
    }
    decay_[m] = old == kMinusInfinity ? 0.0f : std::exp(old - now);
    Vec sum = Vec::zero();
    for (int r = 0; r < n; r += Vec::kWidth) {
      const Vec w = exponential(Vec::load(scores + r) - Vec::all(now));
      w.store(scores + r);
      sum = sum + w;
    }
    state_.sum[m] = state_.sum[m] * decay_[m] + sum.sum();
    state_.top[m] = now;
  }

  // Softcap, ALiBi, mask, and what the query does not see.
  void shape(int m, int row, int n, float* scores) const {
    const int token = m % a_.n_new;
    const std::ptrdiff_t head = std::ptrdiff_t{head_} * a_.group + m / a_.n_new;
    const std::int32_t query = a_.query_positions[sequence_] + token;
    if (a_.rules.softcap > 0) {
      for (int r = 0; r < n; ++r) scores[r] = a_.rules.softcap * std::tanh(scores[r] / a_.rules.softcap);
    }
    if (a_.rules.slopes != nullptr) {
      const float slope = a_.rules.slopes[head];
      for (int r = 0; r < n; ++r) scores[r] += slope * static_cast<float>(position_of(row + r) - query);
    }
    if (a_.mask.kind != MaskKind::kNone) mask(token, head, row, n, scores);
    const std::int32_t first = position_of(row), last = position_of(row + n - 1);
    const bool is_seen_whole = (!a_.rules.is_causal || last <= query) && (a_.rules.window == 0 || first > query - a_.rules.window);
    if (is_seen_whole) return;
    for (int r = 0; r < n; ++r) {
      const std::int32_t at = position_of(row + r);
      const bool is_late = a_.rules.is_causal && at > query;
      const bool is_gone = a_.rules.window > 0 && at <= query - a_.rules.window && at >= a_.rules.sinks;
      if (is_late || is_gone) scores[r] = kMinusInfinity;
    }
  }

  void mask(int token, std::ptrdiff_t head, int row, int n, float* scores) const {
    const auto& t = a_.mask.tensor;
    const std::ptrdiff_t at = sequence_ * t.sequence_stride + head * t.head_stride + token * t.token_stride - a_.mask.offset;
    for (int r = 0; r < n; ++r) {
      const std::ptrdiff_t column = at + position_of(row + r);
      if (a_.mask.kind == MaskKind::kBool) {
        if (!static_cast<const unsigned char*>(t.data)[column]) scores[r] = kMinusInfinity;
      } else {
        const float added = static_cast<const float*>(t.data)[column];
        const bool is_hidden = a_.mask.kind == MaskKind::kFloat && added < kHidden;
        scores[r] = is_hidden ? kMinusInfinity : scores[r] + added;
      }
    }
  }

  const AttentionArguments& a_;
  int m_;
  std::ptrdiff_t k_stride_, v_stride_;
  float *queries_, *scores_, *decay_;
  State state_;
  int sequence_ = 0, head_ = 0;
};

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
