// Attention of many queries over many rows: keys and values are widened once for all queries of a tile.
//
// Work is the list of all (sequence, KV head, tokens), a unit each, that threads take one after the other, the costly
// ones first. A unit goes over the rows that its tokens see, a tile at a time: the tile's keys and values are widened
// and packed into strips, all queries (the tokens of all query heads of the KV head) are scored against it, and the
// weights, by online softmax, are multiplied with its values (Dao et al. 2022, arXiv:2205.14135). What no query of a
// panel sees is not computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention/arguments.h"
#include "attention/formats.inl"
#include "attention/panels.inl"
#include "attention/reading.inl"
#include "attention/sight.inl"
#include "attention/state.inl"
#include "attention/unpack.inl"
#include "isa/small.h"
#include "threads.h"
#ifdef __AVX512BF16__
#include "tiled/prefill.inl"
#endif

namespace stratakv::STRATAKV_ISA {

// Queries of a unit: enough that widening costs little, and so few that what they need stays in the second cache.
constexpr int kUnitQueries = 192;
// Smaller ones where there would be too few for the threads.
constexpr int kLeastUnitQueries = 24;
constexpr int kUnitsAThread = 4;

// How a call is cut into units.
struct Units {
  int tokens;    // of a unit
  int n_pieces;  // of a sequence's tokens
  std::int64_t n;

  static Units of(const AttentionArguments& a, int unit_queries) {
    const std::int64_t n_heads = std::int64_t{a.n_sequences} * a.pages.n_heads;
    const std::int64_t wanted = a.n_threads == 1 ? 1 : kUnitsAThread * a.n_threads / larger<std::int64_t>(n_heads, 1);
    const int least = pieces(a, larger(1, unit_queries / a.group)), most = pieces(a, larger(1, kLeastUnitQueries / a.group));
    const int tokens = pieces(a, static_cast<int>(between<std::int64_t>(wanted, least, most)));
    return {tokens, pieces(a, tokens), n_heads * pieces(a, tokens)};
  }

 private:
  static int pieces(const AttentionArguments& a, int tokens) { return (a.n_new + tokens - 1) / tokens; }
};

// Rows of any format, which are unpacked before they are made into strips.
struct Any {};

// A call, seen from one thread.
template <typename K, typename V>
class Prefilling {
  static constexpr bool kUnpacks = std::is_same_v<K, Any>;
  using Key = std::conditional_t<kUnpacks, float, K>;
  using Value = std::conditional_t<kUnpacks, float, V>;

 public:
  Prefilling(const AttentionArguments& a, int tokens, float* memory)
      : a_(a),
        m_(tokens * a.group),
        v_stride_(padded(a.pages.v_dim)),
        queries_(memory),
        scores_(queries_ + whole_panels(m_) * padded(a.pages.k_dim)),
        decay_(scores_ + whole_panels(m_) * kPanelRows),
        keys_(decay_ + padded(whole_panels(m_))),
        values_(keys_ + kPanelRows * padded(a.pages.k_dim)),
        state_(State::at(values_ + kPanelRows * v_stride_, whole_panels(m_))),
        spans_(reinterpret_cast<Span*>(state_.values + whole_panels(m_) * v_stride_)),
        unpacked_(state_.values + whole_panels(m_) * v_stride_ + span_floats(whole_panels(m_))) {}

  static std::ptrdiff_t floats(const AttentionArguments& a, int tokens) {
    const std::ptrdiff_t m = whole_panels(std::ptrdiff_t{tokens} * a.group);
    const std::ptrdiff_t of_queries = m * (padded(a.pages.k_dim) + kPanelRows) + padded(m) + State::floats(m, a.pages.v_dim);
    const std::ptrdiff_t of_rows = kPanelRows * (padded(a.pages.k_dim) + padded(a.pages.v_dim));
    return of_queries + of_rows + span_floats(m) + (kUnpacks ? of_rows : 0);
  }

  static constexpr int kUnit = kUnitQueries;
  static constexpr int kRows = kPanelRows;

  // Queries as panels [panel, k_dim, kPanel]; those that fill up the last one are zeros.
  void begin(int sequence, int head, int from, int to) {
    sequence_ = sequence;
    head_ = head;
    from_ = from;
    m_ = (to - from) * a_.group;
    const std::ptrdiff_t m = whole_panels(m_), dim = a_.pages.k_dim;
    fill(queries_, m * dim, 0.0f);
    fill(decay_, m, 0.0f);
    fill(state_.top, m, kMinusInfinity);
    fill(state_.sum, m, 0.0f);
    fill(state_.values, m * v_stride_, 0.0f);
    for (int i = 0; i < m_; ++i) {
      float* panel = queries_ + i / kPanel * kPanel * dim + i % kPanel;
      load_query(a_, sequence_, query(i), a_.rules.scale, scores_);
      if constexpr (kUnpacks) with_keys(a_.pages.k_type, [&](auto format) { turn<decltype(format)>(scores_, a_.pages.k_dim); });
      for (std::ptrdiff_t d = 0; d < dim; ++d) panel[d * kPanel] = scores_[d];
    }
  }

  // All queries, to the rows [row, row + n).
  void attend(const Sight& sight, int row, int n) {
    int end = 0;
    for (int m = 0; m < m_; m += kPanel) {
      spans_[m / kPanel] = seen_by_panel(sight, m, row, n);
      end = larger(end, spans_[m / kPanel].to);
    }
    if (end == 0) return;
    pack(row, end);
    for (int strip = 0; strip < end; strip += kStrip) {
      const float* keys = keys_ + std::ptrdiff_t{strip} * a_.pages.k_dim;
      for (std::ptrdiff_t m = 0; m < m_; m += kPanel) {
        const Span span = spans_[m / kPanel];
        if (strip + kStrip <= span.from || span.to <= strip) continue;
        score_panel(queries_ + m * a_.pages.k_dim, keys, a_.pages.k_dim, scores_ + m * kPanelRows + strip, kPanelRows);
      }
    }
    for (int m = 0; m < m_; ++m) {
      const Span span = spans_[m / kPanel];
      if (span.is_empty()) continue;
      float* scores = scores_ + std::ptrdiff_t{m} * kPanelRows + span.from;
      sight.shape(query(m), row + span.from, span.to - span.from, scores);
      decay_[m] = soften(scores, span.to - span.from, state_.top[m], state_.sum[m]);
    }
    for (std::ptrdiff_t d = 0; d < v_stride_; d += kStrip) {
      const int width = width_at(d, v_stride_) * Vec::kWidth;
      for (std::ptrdiff_t m = 0; m < m_; m += kPanel) {
        const Span span = spans_[m / kPanel];
        if (span.is_empty()) continue;
        const float* weights = scores_ + m * kPanelRows + span.from;
        const float* strip = values_ + d * end + std::ptrdiff_t{span.from} * width;
        float* values = state_.values + m * v_stride_ + d;
        if (width == kStrip) add_panel<kVectors>(weights, decay_ + m, strip, span.to - span.from, values, v_stride_);
        else add_panel<1>(weights, decay_ + m, strip, span.to - span.from, values, v_stride_);
      }
    }
  }

  void finish() {
    for (int m = 0; m < m_; ++m) {
      float* const values = state_.values + m * v_stride_;
      if constexpr (kUnpacks) with_values(a_.pages.v_type, [&](auto format) { turn<decltype(format)>(values, a_.pages.v_dim); });
      STRATAKV_ISA::finish(a_, sequence_, query(m), state_.top[m], state_.sum[m], values);
    }
  }

 private:
  // The query heads of a token follow one another, so that the queries of a panel see much the same.
  Query query(int m) const { return {from_ + m / a_.group, std::ptrdiff_t{head_} * a_.group + m % a_.group}; }

  // What the queries of the panel from `m` on see of the rows [row, row + n), from a whole register of scores on.
  Span seen_by_panel(const Sight& sight, int m, int row, int n) const {
    Span all{n, 0};
    for (int i = m; i < smaller(m + kPanel, m_); ++i) {
      const Span span = sight.seen(query(i), row, n);
      if (span.is_empty()) continue;
      all = {smaller(all.from, span.from), larger(all.to, span.to)};
    }
    return {all.from / Vec::kWidth * Vec::kWidth, all.to};
  }

  static std::ptrdiff_t span_floats(std::ptrdiff_t m) {
    return padded(m / kPanel * static_cast<std::ptrdiff_t>(sizeof(Span) / sizeof(float)));
  }

  void pack(int row, int n) {
    const Key* keys[kPanelRows];
    const Value* values[kPanelRows];
    for (int r = 0; r < n;) {
      const int block = (row + r) / a_.pages.block_tokens, at = (row + r) % a_.pages.block_tokens;
      const int count = smaller(a_.pages.block_tokens - at, n - r);
      const char* bytes = block_bytes(a_.pages, sequence_, block);
      const char *block_keys = bytes + keys_at(a_.pages, head_), *block_values = bytes + values_at(a_.pages, head_);
      if constexpr (kUnpacks) {
        const std::ptrdiff_t k_stride = padded(a_.pages.k_dim);
        float *const own_keys = unpacked_ + r * k_stride, *const own_values = unpacked_ + kPanelRows * k_stride + r * v_stride_;
        with_keys(a_.pages.k_type, [&](auto format) {
          unpack(key_rows_in<decltype(format)>(a_.pages, block_keys, at), count, a_.pages.k_dim, own_keys, k_stride);
        });
        with_values(a_.pages.v_type, [&](auto format) {
          unpack(value_rows_in<decltype(format)>(a_.pages, block_values, at), count, a_.pages.v_dim, own_values, v_stride_);
        });
        for (int i = 0; i < count; ++i) {
          keys[r + i] = own_keys + i * k_stride;
          values[r + i] = own_values + i * v_stride_;
        }
      } else {
        const K* const own_keys = key_rows_in<K>(a_.pages, block_keys, at);
        const V* const own_values = value_rows_in<V>(a_.pages, block_values, at);
        for (int i = 0; i < count; ++i) {
          keys[r + i] = own_keys + std::ptrdiff_t{i} * a_.pages.k_dim;
          values[r + i] = own_values + std::ptrdiff_t{i} * a_.pages.v_dim;
        }
      }
      r += count;
    }
    pack_keys(keys, n, a_.pages.k_dim, keys_);
    pack_values(values, n, a_.pages.v_dim, values_);
  }

  const AttentionArguments& a_;
  int m_;
  std::ptrdiff_t v_stride_;
  float *queries_, *scores_, *decay_, *keys_, *values_;
  State state_;
  Span* spans_;  // [panel], of the tile's rows
  float* unpacked_;  // a tile's keys and values
  int sequence_ = 0, head_ = 0, from_ = 0;
};

// Attention of the tokens [from, to) of a sequence to all they see.
template <typename Kernel>
void run_unit(const AttentionArguments& a, Kernel& kernel, int sequence, int head, int from, int to) {
  const Sight sight(a, sequence);
  kernel.begin(sequence, head, from, to);
  const Span gone = sight.gone(from);
  const int end = sight.end(to - 1);
  for (int row = a.rows.skips[sequence]; row < end;) {
    if (gone.from <= row && row < gone.to) {
      row = gone.to;
      continue;
    }
    const int stop = row < gone.from && gone.from < gone.to ? smaller(end, gone.from) : end;
    const int n = smaller(Kernel::kRows, stop - row);
    kernel.attend(sight, row, n);
    row += n;
  }
  kernel.finish();
}

template <typename Kernel>
void prefill_units(const AttentionArguments& a) {
  const Units units = Units::of(a, Kernel::kUnit);
  const std::ptrdiff_t a_thread = Kernel::floats(a, units.tokens);
  const int n_threads = static_cast<int>(between<std::int64_t>(units.n, 1, a.n_threads));
  std::int64_t taken = 0;
  in_parallel(n_threads, [&](int thread) {
    Kernel kernel(a, units.tokens, a.scratch + thread * a_thread);
    for (;;) {
      const std::int64_t unit = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
      if (unit >= units.n) return;
      const std::int64_t n_heads = units.n / units.n_pieces, head = unit % n_heads;
      const int from = static_cast<int>(units.n_pieces - 1 - unit / n_heads) * units.tokens;  // the last see most
      run_unit(a, kernel, static_cast<int>(head / a.pages.n_heads), static_cast<int>(head % a.pages.n_heads), from,
               smaller(from + units.tokens, a.n_new));
    }
  });
}

template <typename K>
void prefill_keys(const AttentionArguments& a) {
  switch (a.pages.v_type) {
    case NumberType::kFloat: prefill_units<Prefilling<K, float>>(a); break;
    case NumberType::kBFloat: prefill_units<Prefilling<K, BFloat>>(a); break;
    default: prefill_units<Prefilling<K, Half>>(a); break;
  }
}

inline bool unpacks(const AttentionArguments& a) { return !is_plain(a.pages.k_type) || !is_plain(a.pages.v_type); }

#ifdef __AVX512BF16__
// What `function` gives for the kernel of a call that is for tiles.
template <typename Function>
auto with_tiles(const AttentionArguments& a, const Function& function) {
  const bool is_bfloat = a.pages.k_type == NumberType::kBFloat && a.pages.v_type == NumberType::kBFloat;
  if constexpr (Tiles::kSplitsPay) {
    if (!a.rounds) return is_bfloat ? function(std::type_identity<TiledPrefilling<kParts, false>>()) : function(std::type_identity<TiledPrefilling<kParts, true>>());
  }
  return is_bfloat ? function(std::type_identity<TiledPrefilling<1, false>>()) : function(std::type_identity<TiledPrefilling<1, true>>());
}
#endif

inline void prefill(const AttentionArguments& a) {
#ifdef __AVX512BF16__
  if (is_for_tiles(a)) return with_tiles(a, [&](auto kernel) { prefill_units<typename decltype(kernel)::type>(a); });
#endif
  if (unpacks(a)) return prefill_units<Prefilling<Any, Any>>(a);
  switch (a.pages.k_type) {
    case NumberType::kFloat: prefill_keys<float>(a); break;
    case NumberType::kBFloat: prefill_keys<BFloat>(a); break;
    default: prefill_keys<Half>(a); break;
  }
}

template <typename Kernel>
std::ptrdiff_t unit_floats(const AttentionArguments& a) {
  return a.n_threads * Kernel::floats(a, Units::of(a, Kernel::kUnit).tokens);
}

inline std::ptrdiff_t prefill_floats(const AttentionArguments& a) {
#ifdef __AVX512BF16__
  if (is_for_tiles(a)) return with_tiles(a, [&](auto kernel) { return unit_floats<typename decltype(kernel)::type>(a); });
#endif
  return unpacks(a) ? unit_floats<Prefilling<Any, Any>>(a) : unit_floats<Prefilling<float, float>>(a);
}

}  // namespace stratakv::STRATAKV_ISA
