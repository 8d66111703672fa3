// Attention of few queries over many rows, as one thread sees it: it keeps the running maximum, sum and weighted values of all
// queries of one sequence (online softmax, Milakov and Gimelshein 2018). It takes all KV heads of some rows before it goes on, so
// that it reads memory in few lines: processors fetch ahead of those, and of little else.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/formats.inl"
#include "attention/pairs.inl"
#include "attention/reading.inl"
#include "attention/sight.inl"
#include "attention/state.inl"
#include "attention/tiles.inl"
#include "isa/small.h"
#include "isa/vendor.h"

namespace stratakv::STRATAKV_ISA {

// The blocks of a tile take turns by so many rows on Intel's wide processors. They fetch some 20 lines ahead of each line of
// reading, and compute so fast that one line is not enough: two give them twice as many. Others are faster in one line.
constexpr int kTurn = 8;

// Query i of a sequence.
inline Query query_of(const AttentionArguments& a, int i) { return {i % a.n_new, i / a.n_new}; }

// A call, seen from one thread. Its queries are ordered by KV head, then query head, then token.
class Decoding {
 public:
  Decoding(const AttentionArguments& a, float* memory)
      : n_(queries_in(a)), k_stride_(padded(a.pages.k_dim)), v_stride_(padded(a.pages.v_dim)), v_dim_(a.pages.v_dim),
        rounding_(a) {
    for (int i = 0; i < kStrands; ++i) {
      strands_[i].a = strand(a, i);
      strands_[i].queries = memory;
      memory += n_ * k_stride_;
    }
    scores_ = memory;
    decay_ = scores_ + std::ptrdiff_t{n_} * kTileRows;
    state_ = State::at(decay_ + padded(n_), n_);
  }

  static int queries_in(const AttentionArguments& a) { return a.pages.n_heads * a.group * a.n_new; }

  static std::ptrdiff_t floats(const AttentionArguments& a) {
    const std::ptrdiff_t n = queries_in(a);
    return kStrands * n * padded(a.pages.k_dim) + n * kTileRows + padded(n) + State::floats(n, a.pages.v_dim);
  }

  const State& state() const { return state_; }

  void begin(int sequence) {
    sequence_ = sequence;
    for (Strand& each : strands_) each.has_queries = false;
    order_ = NumberType::kFloat;
    fill(state_.top, n_, kMinusInfinity);
    fill(state_.sum, n_, 0.0f);
    fill(state_.values, n_ * v_stride_, 0.0f);
  }

  // Attend to the rows [from, to) of one strand of the sequence.
  void attend(int which, int from, int to) {
    Strand& own = strands_[which];
    if (!own.has_queries) load_queries(own);
    take_order(own.a->pages.v_type);
    // Tiles end where groups of rows do, which the first of them may begin in the middle of.
    for (int row = from, end; row < to; row = end) {
      end = smaller((row / kTileRows + 1) * kTileRows, to);
      attend(own, row, end);
    }
  }

  // All rows were attended to.
  void end() { take_order(NumberType::kFloat); }

 private:
  struct Strand {
    const AttentionArguments* a;
    float* queries;  // in the form in which they meet the strand's keys
    bool has_queries;
  };

  void load_queries(Strand& own) {
    const AttentionArguments& a = *own.a;
    with_keys(a.pages.k_type, rounding_, [&](auto format) {
      const float factor = IsPaired<decltype(format)> ? 1.0f : a.rules.scale;  // pairs' scores are scaled
      for (int i = 0; i < n_; ++i) {
        load_query(a, sequence_, query_of(a, i), factor, own.queries + i * k_stride_);
        arrange<decltype(format)>(own.queries + i * k_stride_, a.pages.k_dim);
      }
    });
    own.has_queries = true;
  }

  // Values take the form in which rows of a type are added to them; floats leave them as they are.
  void take_order(NumberType type) {
    if (type == order_) return;
    with_values(order_, rounding_, [&](auto format) {
      for (int i = 0; i < n_; ++i) settle<decltype(format)>(state_.values + i * v_stride_, v_dim_);
    });
    with_values(type, rounding_, [&](auto format) {
      for (int i = 0; i < n_; ++i) unsettle<decltype(format)>(state_.values + i * v_stride_, v_dim_);
    });
    order_ = type;
  }

  // At most kTileRows rows. All keys of a block lie before its values, and all pages are read in that order.
  void attend(const Strand& own, int from, int to) {
    const AttentionArguments& a = *own.a;
    const int m = a.group * a.n_new, n = to - from;
    with_keys(a.pages.k_type, rounding_, [&](auto format) {
      using K = decltype(format);
      each_page<IsPacked<K> ? kTileRows : kTurn>(a, from, to, [&](const Stretch& rows, int head) {
        const auto keys = key_rows_in<K>(a.pages, rows.bytes + keys_at(a.pages, head), rows.in_page);
        in_fours(m, [&](int i, auto count) {
          const std::ptrdiff_t query = std::ptrdiff_t{head} * m + i;
          score_rows<K, decltype(count)::value>(keys, rows.n, a.pages.k_dim, own.queries + query * k_stride_, k_stride_,
                                                scores_ + query * kTileRows + rows.at,
                                                i == 0 ? wanted(a, rows, place_of(keys), IsPacked<K> ? a.pages.k_page_bytes : 0) : Wanted{});
        });
      });
      for (int i = 0; i < n_; ++i) scale_scores<K>(scores_ + std::ptrdiff_t{i} * kTileRows, n, a.rules.scale);
    });
    const Sight sight(a, sequence_);
    for (int i = 0; i < n_; ++i) {
      float* scores = scores_ + std::ptrdiff_t{i} * kTileRows;
      sight.shape(query_of(a, i), from, n, scores);
      decay_[i] = soften(scores, n, state_.top[i], state_.sum[i]);
    }
    with_values(a.pages.v_type, rounding_, [&](auto format) {
      using V = decltype(format);
      for (int i = 0; i < n_; ++i) round_weights<V>(scores_ + std::ptrdiff_t{i} * kTileRows, n);
      if constexpr (IsPacked<V>) return add_packed<V>(a, from, to);
      else each_page<kTurn>(a, from, to, [&](const Stretch& rows, int head) {
        const auto values = value_rows_in<V>(a.pages, rows.bytes + values_at(a.pages, head), rows.in_page);
        in_fours(m, [&](int i, auto count) {
          const std::ptrdiff_t query = std::ptrdiff_t{head} * m + i;
          const auto* const weights = reinterpret_cast<const WeightOf<V>*>(scores_ + query * kTileRows) + rows.at;
          add_values<V, decltype(count)::value>(values, rows.n, v_dim_, weights, decay_ + query,
                                                state_.values + query * v_stride_, v_stride_,
                                                i == 0 ? wanted(a, rows, place_of(values), 0) : Wanted{});
          for (int j = 0; j < decltype(count)::value; ++j) decay_[query + j] = 1.0f;  // the tile's other rows add to this
        });
      });
    });
  }

  // Values in tiles of their own: of one head all that fit into a few.
  template <typename V>
  void add_packed(const AttentionArguments& a, int from, int to) {
    const int m = a.group * a.n_new;
    for (int head = 0; head < a.pages.n_heads; ++head) {
      ValueTiles<V> tiles;
      const auto add = [&] {
        in_fours(m, [&](int i, auto count) {
          const std::ptrdiff_t query = std::ptrdiff_t{head} * m + i;
          add_values<V, decltype(count)::value>(tiles, v_dim_, scores_ + query * kTileRows, decay_ + query,
                                                state_.values + query * v_stride_, v_stride_, i == 0);
        });
        for (int i = 0; i < m; ++i) decay_[head * m + i] = 1.0f;  // the other rows add to this
        tiles.clear();
      };
      each_block(a, from, to, 2, [&](const Stretch& rows) {
        if (!tiles.has_room(rows.n)) add();
        const auto values = value_rows_in<V>(a.pages, rows.bytes + values_at(a.pages, head), rows.in_page);
        // The tiles are gone over once for every few channels, so that what comes next is the next head's.
        tiles.add(values, rows.n, rows.at, wanted(a, rows, place_of(values), a.pages.v_page_bytes));
      });
      add();
    }
  }

  // Rows of one block that lie in a tile.
  struct Stretch {
    const char* bytes;  // of the block
    const char* next;   // of that which is read when this one ends
    int in_page, at, n;  // the first row in the page and in the tile, and how many there are

    Stretch turn(int row, int most) const { return {bytes, next, in_page + row, at + row, smaller(most, n - row)}; }
  };

  static std::ptrdiff_t bytes_of_block(const Pages& pages) { return pages.n_heads * (pages.k_page_bytes + pages.v_page_bytes); }

  // What is wanted so many bytes after a place in a block: blocks are read from their first byte to their last.
  static const char* ahead(const AttentionArguments& a, const Stretch& rows, const void* place, std::ptrdiff_t distance) {
    const std::ptrdiff_t wanted = static_cast<const char*>(place) - rows.bytes + distance;
    const std::ptrdiff_t behind = wanted - bytes_of_block(a.pages);
    return behind < 0 ? rows.bytes + wanted : rows.next + behind;
  }

  // Rows of few bits ask for the next page; on AMD's wide processors, which are done with a short one before that has come, for
  // one as far ahead as other rows at least, but at most a block. Those processors drop what they have no place for, and compute
  // so fast that it is much: they are asked twice, but for rows of fewer than 8 bits (fetch_line).
  static Wanted wanted(const AttentionArguments& a, const Stretch& rows, const void* place, std::ptrdiff_t packed_page) {
    std::ptrdiff_t far = pages_ahead(), near = far / 2;
    if (packed_page > 0) {
      far = is_wide_amd() ? smaller((far + packed_page - 1) / packed_page * packed_page, bytes_of_block(a.pages)) : packed_page;
      near = larger<std::ptrdiff_t>(far - 1024, far / 2);
    }
    return {ahead(a, rows, place, far), is_wide_amd() ? ahead(a, rows, place, near) : nullptr};
  }

  // function(stretch) for the rows [from, to), where so many blocks later is read when a stretch ends.
  template <typename Function>
  void each_block(const AttentionArguments& a, int from, int to, int later, const Function& function) const {
    const int span = a.pages.block_tokens, last = (a.rows.counts[sequence_] - 1) / span;
    for (int row = from; row < to;) {
      const int block = row / span;
      const Stretch rows{block_bytes(a.pages, sequence_, block), block_bytes(a.pages, sequence_, smaller(block + later, last)),
                         row % span, row - from, smaller(span - row % span, to - row)};
      function(rows);
      row += rows.n;
    }
  }

  // function(stretch, head) for the rows [from, to).
  template <int kRowsOfTurn, typename Function>
  void each_page(const AttentionArguments& a, int from, int to, const Function& function) const {
    constexpr int kMost = kTileRows / kTurn + 1;
    const int span = a.pages.block_tokens;
    Stretch stretches[kMost];
    const bool takes_turns = (is_wide_intel() || kRowsOfTurn == kTileRows) && span >= kTurn;
    int n = 0, most = 0;
    each_block(a, from, to, takes_turns ? (kTileRows + span - 1) / span : 1, [&](const Stretch& next) {
      most = larger(most, next.n);
      if (takes_turns) stretches[n++] = next;
      else for (int head = 0; head < a.pages.n_heads; ++head) function(next, head);
    });
    const int turn = n == 1 ? kTileRows : kRowsOfTurn;
    for (int head = 0; head < a.pages.n_heads && n > 0; ++head) {
      for (int row = 0; row < most; row += turn) {
        for (int i = 0; i < n; ++i) {
          if (row < stretches[i].n) function(stretches[i].turn(row, turn), head);
        }
      }
    }
  }

  int n_;
  std::ptrdiff_t k_stride_, v_stride_;
  int v_dim_;
  Rounding rounding_;
  Strand strands_[kStrands];
  float *scores_, *decay_;
  State state_;
  NumberType order_ = NumberType::kFloat;
  int sequence_ = 0;
};

}  // namespace stratakv::STRATAKV_ISA
