// Attention of many queries over many rows in tiles: of bf16 pages as they lie, of others that are split into bf16 parts.
//
// As in attention/prefill.inl, but for how a tile of rows is taken. Scores come out with rows down and queries across
// (keys as they lie, times packed queries), so that a register holds one row's scores of 16 queries: maxima, sums and
// masks need nothing but whole registers, and two rows of weights, interleaved, are what the next product wants to have
// packed. Values are turned, once for all queries, and their sums have numbers down and queries across.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/formats.inl"
#include "attention/reading.inl"
#include "attention/sight.inl"
#include "attention/state.inl"
#include "attention/unpack.inl"
#include "isa/exponential.h"
#include "isa/small.h"
#include "tiled/packing.inl"
#include "tiled/tiles.h"

namespace stratakv::STRATAKV_ISA {

// Queries of a unit: enough that turning values costs little.
constexpr int kTiledUnitQueries = 384;

// Rows of a tile of the cache.
constexpr int kTiledTileRows = 192;

constexpr int kTileSums = kTile * kTile;

// e^(x - base), 0 for -inf; for weights in one part as exactly as that needs. The difference first: one rounding of the two
// scaled would be another factor for each base, and great for great scores.
template <int kOf>
inline Vec weight_of(Vec x, Vec base) {
  return exponential_2<kOf == 1>(((x - base) * Vec::all(kLog2E)).v);
}

// Whether a call has neither masks nor slopes, which differ between queries and rows, nor fp32 rows, which have more bits
// than two parts: the kernel of plain registers has all that.
inline bool is_for_tiles(const AttentionArguments& a) {
  return (Tiles::kSplitsPay || a.rounds) && a.pages.k_type != NumberType::kFloat && a.pages.v_type != NumberType::kFloat &&
         a.mask.kind == MaskKind::kNone && a.rules.slopes == nullptr;
}

// A call, seen from one thread. Queries and weights are split into kOf parts, and rows of other formats than bf16.
template <int kOf, bool kUnpacks>
class TiledPrefilling {
  static constexpr int kRowParts = kUnpacks ? kOf : 1;
  static constexpr int kPanelPitch = kOf * kTileNumbers;  // of queries and of weights

 public:
  TiledPrefilling(const AttentionArguments& a, int tokens, float* memory) : a_(a), sizes_(a, tokens) {
    float* next = memory;
    const auto take = [&](std::ptrdiff_t n) {
      float* const at = next;
      next += n;
      return at;
    };
    queries_ = reinterpret_cast<BFloat*>(take(sizes_.queries));
    scores_ = take(sizes_.scores);
    weights_ = reinterpret_cast<BFloat*>(take(sizes_.weights));
    keys_ = reinterpret_cast<BFloat*>(take(sizes_.keys));
    values_ = reinterpret_cast<BFloat*>(take(sizes_.values));
    sums_ = take(sizes_.sums);
    top_ = take(sizes_.m);
    sum_ = take(sizes_.m);
    unpacked_ = take(sizes_.unpacked);
    split_values_ = reinterpret_cast<BFloat*>(take(sizes_.split_values));
  }

  static constexpr int kUnit = kTiledUnitQueries;
  static constexpr int kRows = kTiledTileRows;

  static std::ptrdiff_t floats(const AttentionArguments& a, int tokens) {
    const Sizes s(a, tokens);
    return s.queries + s.scores + s.weights + s.keys + s.values + s.sums + 2 * s.m + s.unpacked + s.split_values;
  }

  void begin(int sequence, int head, int from, int to) {
    sequence_ = sequence;
    head_ = head;
    from_ = from;
    m_ = (to - from) * a_.group;
    n_pairs_ = (m_ + kTiledPair - 1) / kTiledPair;
    const std::ptrdiff_t stride = padded(a_.pages.k_dim);
    for (int p = 0; p < 2 * n_pairs_; ++p) {
      const int n = between(m_ - p * kTile, 0, kTile);
      for (int i = 0; i < n; ++i) {
        load_query(a_, sequence, query(p * kTile + i), a_.rules.scale, scores_ + i * stride);
        if constexpr (kUnpacks) with_keys(a_.pages.k_type, [&](auto format) { turn<decltype(format)>(scores_ + i * stride, a_.pages.k_dim); });
      }
      pack_panel<kOf>(scores_, stride, n, a_.pages.k_dim, queries_ + p * sizes_.query_panel);
    }
    fill(top_, std::ptrdiff_t{n_pairs_} * kTiledPair, kMinusInfinity);
    fill(sum_, std::ptrdiff_t{n_pairs_} * kTiledPair, 0.0f);
    fill(sums_, std::ptrdiff_t{n_pairs_} * 2 * sizes_.sum_panel, 0.0f);
  }

  // All queries, to the rows [row, row + n).
  void attend(const Sight& sight, int row, int n) {
    const int end = smaller(n, sight.end(query(m_ - 1).token) - row);
    if (end <= 0) return;
    pack(row, end);
    for (int p = 0; p < n_pairs_; ++p) {
      const Span span = seen_by_pair(sight, p, row, n);
      if (span.is_empty()) continue;
      score(p, span);
      for (int half = 0; half < 2; ++half) soften(sight, 2 * p + half, row, span);
      add(p, span);
    }
  }

  void finish() {
    const std::ptrdiff_t n_tiles = sizes_.v_width / kTile;
    for (int p = 0; p * kTile < m_; ++p) {
      for (std::ptrdiff_t t = 0; t < n_tiles; ++t) {
        Vec x[kTile];
        STRATAKV_UNROLL
        for (int i = 0; i < kTile; ++i) x[i] = Vec::load(sums_ + p * sizes_.sum_panel + t * kTileSums + i * kTile);
        Vec::transpose(x);
        STRATAKV_UNROLL
        for (int i = 0; i < kTile; ++i) x[i].store(scores_ + i * sizes_.v_width + t * kTile);
      }
      for (int i = 0; i < smaller(kTile, m_ - p * kTile); ++i) {
        const int m = p * kTile + i;
        float* const values = scores_ + i * sizes_.v_width;
        if constexpr (kUnpacks) with_values(a_.pages.v_type, [&](auto format) { turn<decltype(format)>(values, a_.pages.v_dim); });
        STRATAKV_ISA::finish(a_, sequence_, query(m), top_[m], sum_[m], values);
      }
    }
  }

 private:
  struct Sizes {
    std::ptrdiff_t m, query_panel, weight_panel, sum_panel, k_width, v_width, queries, scores, weights, keys, values, sums, unpacked,
        split_values;

    Sizes(const AttentionArguments& a, int tokens)
        : m((std::ptrdiff_t{tokens} * a.group + kTiledPair - 1) / kTiledPair * kTiledPair),
          query_panel(packed_numbers<kOf>(a.pages.k_dim)),
          weight_panel(packed_numbers<kOf>(kTiledTileRows)),
          sum_panel(whole_steps(a.pages.v_dim) * 2 * kTileSums),
          k_width(whole_steps(a.pages.k_dim) * kDeep),
          v_width(whole_steps(a.pages.v_dim) * kDeep),
          queries(m / kTile * query_panel / 2),
          scores(larger(std::ptrdiff_t{kTiledPair} * kTiledTileRows, kTile * larger(padded(a.pages.k_dim), v_width))),
          weights(weight_panel),
          keys(kRowParts * kTiledTileRows * k_width / 2),
          values(kRowParts * v_width * kTiledTileRows / 2),
          sums(m / kTile * sum_panel),
          unpacked(kUnpacks ? kTiledTileRows * larger(k_width, v_width) : 0),
          split_values(kUnpacks ? kRowParts * kTiledTileRows * v_width / 2 : 0) {}
  };

  // The query heads of a token follow one another, so that the queries of a panel see much the same.
  Query query(int m) const { return {from_ + m / a_.group, std::ptrdiff_t{head_} * a_.group + m % a_.group}; }

  // What the queries of a pair of panels see of the rows [row, row + n), from whole tiles on.
  Span seen_by_pair(const Sight& sight, int pair, int row, int n) const {
    const Span first = sight.seen(query(pair * kTiledPair), row, n);
    const Span last = sight.seen(query(smaller((pair + 1) * kTiledPair, m_) - 1), row, n);
    return {first.from / kTiledPair * kTiledPair, last.to};
  }

  // Keys [part, row, width] and values [part, number, row], up to whole tiles: what lies behind the last row is zero.
  void pack(int row, int n) {
    const int whole = (n + kTiledPair - 1) / kTiledPair * kTiledPair;
    const BFloat* values[kTiledTileRows];
    for (int r = 0; r < n;) {
      const int block = (row + r) / a_.pages.block_tokens, at = (row + r) % a_.pages.block_tokens;
      const int count = smaller(a_.pages.block_tokens - at, n - r);
      const char* const bytes = block_bytes(a_.pages, sequence_, block);
      if constexpr (kUnpacks) {
        with_keys(a_.pages.k_type, [&](auto format) {
          unpack(key_rows_in<decltype(format)>(a_.pages, bytes + keys_at(a_.pages, head_), at), count, a_.pages.k_dim, unpacked_, sizes_.k_width);
        });
        split_rows(count, a_.pages.k_dim, sizes_.k_width, keys_ + r * sizes_.k_width);
        with_values(a_.pages.v_type, [&](auto format) {
          unpack(value_rows_in<decltype(format)>(a_.pages, bytes + values_at(a_.pages, head_), at), count, a_.pages.v_dim, unpacked_, sizes_.v_width);
        });
        split_rows(count, a_.pages.v_dim, sizes_.v_width, split_values_ + r * sizes_.v_width);
      } else {
        const BFloat* const own_keys = keys_in<BFloat>(a_.pages, bytes, head_) + std::ptrdiff_t{at} * a_.pages.k_dim;
        for (int i = 0; i < count; ++i) {
          copy_row(own_keys + std::ptrdiff_t{i} * a_.pages.k_dim, a_.pages.k_dim, keys_ + (r + i) * sizes_.k_width, sizes_.k_width);
          values[r + i] = values_in<BFloat>(a_.pages, bytes, head_) + std::ptrdiff_t{at + i} * a_.pages.v_dim;
        }
      }
      r += count;
    }
    for (int part = 0; part < kRowParts; ++part) {
      fill(reinterpret_cast<float*>(key_rows(part, n)), (whole - n) * sizes_.k_width / 2, 0.0f);
      for (int r = 0; r < n && kUnpacks; ++r) values[r] = split_values_ + (std::ptrdiff_t{part} * kTiledTileRows + r) * sizes_.v_width;
      for (int r = 0; r < whole; r += kDeep) {
        for (int d = 0; d < sizes_.v_width; d += kTile) turn_values(values + r, n - r, r, d, value_rows(part, d));
      }
    }
  }

  BFloat* key_rows(int part, int row) const { return keys_ + (std::ptrdiff_t{part} * kTiledTileRows + row) * sizes_.k_width; }
  BFloat* value_rows(int part, std::ptrdiff_t number) const { return values_ + (part * sizes_.v_width + number) * kTiledTileRows; }

  // Rows that were unpacked, in parts, zeros behind the last number.
  void split_rows(int n, int dim, std::ptrdiff_t width, BFloat* to) const {
    for (std::ptrdiff_t r = 0; r < n; ++r) {
      for (int d = 0; d < width; d += kDeep) {
        const float* const from = unpacked_ + r * width + d;
        const int some = dim - d;
        const Vec second = some > Vec::kWidth ? load_up_to(from + Vec::kWidth, some - Vec::kWidth) : Vec::zero();
        const Split parts = split(some > 0 ? load_up_to(from, some).v : Vec::zero().v, second.v);
        _mm512_storeu_si512(to + r * width + d, parts.high);
        if constexpr (kRowParts > 1) _mm512_storeu_si512(to + (kTiledTileRows + r) * width + d, parts.low);
      }
    }
  }

  static void copy_row(const BFloat* from, int dim, BFloat* to, std::ptrdiff_t width) {
    for (int d = 0; d < width; d += kDeep) _mm512_storeu_si512(to + d, some_numbers(from + d, dim - d));
  }

  // 16 numbers from d on of 32 rows from `row` on, of which `n` are there, become 16 rows of 32.
  void turn_values(const BFloat* const* rows, int n, int row, int d, BFloat* to) const {
    const int dims = a_.pages.v_dim - d;
    Vec pairs[kTile];
    STRATAKV_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const __m512i first = _mm512_cvtepu16_epi32(half_numbers(rows, 2 * i, n, d, dims));
      const __m512i second = _mm512_cvtepu16_epi32(half_numbers(rows, 2 * i + 1, n, d, dims));
      pairs[i].v = _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    Vec::transpose(pairs);
    STRATAKV_UNROLL
    for (int i = 0; i < kTile; ++i) _mm512_storeu_ps(to + std::ptrdiff_t{i} * kTiledTileRows + row, pairs[i].v);
  }

  static __m256i half_numbers(const BFloat* const* rows, int r, int n, int d, int dims) {
    if (r >= n || dims <= 0) return _mm256_setzero_si256();
    if (dims >= kTile) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + d));
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << dims) - 1), rows[r] + d);
  }

  // Scores of a pair of panels: [panel, row, query].
  void score(int pair, Span span) {
    const BFloat* const queries = queries_ + std::ptrdiff_t{pair} * 2 * sizes_.query_panel;
    for (int r = span.from; r < span.to; r += kTiledPair) {
      float* const to = scores_ + std::ptrdiff_t{r} * kTile;
      float* const other = to + std::ptrdiff_t{kTiledTileRows} * kTile;
      for (int part = 0; part < kRowParts; ++part) {
        tiles_.multiply<1, kOf>({key_rows(part, r), sizes_.k_width, queries, queries + sizes_.query_panel, kPanelPitch, sizes_.k_width / kDeep},
                                {to, other, kTile}, part > 0);
      }
    }
  }

  // The scores of a panel become weights, packed; maxima and sums move on, and what was gathered loses its share.
  void soften(const Sight& sight, int panel, int row, Span span) {
    float* const scores = scores_ + std::ptrdiff_t{panel % 2} * kTiledTileRows * kTile;
    const int whole = (span.to + kTiledPair - 1) / kTiledPair * kTiledPair;
    Vec top = Vec::load(top_ + panel * kTile);
    const Vec old = top;
    shape(sight, panel, row, span, scores);
    for (int r = span.to; r < whole; ++r) Vec::all(kMinusInfinity).store(scores + r * kTile);
    Vec tops[4] = {top, top, top, top};
    for (int r = span.from; r < whole; r += 4) {
      STRATAKV_UNROLL
      for (int i = 0; i < 4; ++i) tops[i] = Vec::max(tops[i], Vec::load(scores + (r + i) * kTile));
    }
    top = Vec::max(Vec::max(tops[0], tops[1]), Vec::max(tops[2], tops[3]));
    const Vec base = {_mm512_mask_mov_ps(top.v, _mm512_cmp_ps_mask(top.v, Vec::all(kMinusInfinity).v, _CMP_EQ_OQ), Vec::zero().v)};
    const Vec decay = exponential(old - base);
    Vec added[2] = {Vec::zero(), Vec::zero()};
    BFloat* to = weights_ + std::ptrdiff_t{panel % 2} * sizes_.weight_panel + span.from * kOf * kTile;
    for (int r = span.from; r < whole; r += kDeep, to += kOf * kTileNumbers) {
      for (int i = 0; i < kTile; ++i) {
        const float* const at = scores + (r + 2 * i) * std::ptrdiff_t{kTile};
        const Vec first = weight_of<kOf>(Vec::load(at), base), second = weight_of<kOf>(Vec::load(at + kTile), base);
        added[0] = added[0] + first;
        added[1] = added[1] + second;
        store_pair<kOf>(first.v, second.v, to + i * kDeep);
      }
    }
    (Vec::fma(Vec::load(sum_ + panel * kTile), decay, added[0] + added[1])).store(sum_ + panel * kTile);
    top.store(top_ + panel * kTile);
    if (_mm512_cmp_ps_mask(decay.v, Vec::all(1.0f).v, _CMP_NEQ_UQ) == 0) return;
    float* const sums = sums_ + panel * sizes_.sum_panel;
    for (std::ptrdiff_t i = 0; i < sizes_.sum_panel; i += kTile) (Vec::load(sums + i) * decay).store(sums + i);
  }

  // Softcap, and what the queries of a panel do not see.
  void shape(const Sight& sight, int panel, int row, Span span, float* scores) const {
    if (a_.rules.softcap > 0) {
      const Vec cap = Vec::all(a_.rules.softcap), part = Vec::all(1.0f / a_.rules.softcap);
      for (int r = span.from; r < span.to; ++r) (cap * hyperbolic_tangent(Vec::load(scores + r * kTile) * part)).store(scores + r * kTile);
    }
    const int window = a_.rules.window, sinks = a_.rules.sinks;
    const int first = sight.position_of(query(panel * kTile)), last = sight.position_of(query(panel * kTile + kTile - 1));
    // Positions rise: where all queries have passed the last row, they have passed all rows, and where the first row is in all
    // windows, all rows are. That a first row is a sink says nothing about those behind it.
    const bool all_past = !a_.rules.is_causal || sight.position_of(row + span.to - 1) <= first;
    const bool all_near = window == 0 || sight.position_of(row + span.from) > last - window;
    if (all_past && all_near) return;
    alignas(64) std::int32_t positions[kTile];
    for (int i = 0; i < kTile; ++i) positions[i] = sight.position_of(query(panel * kTile + i));
    const __m512i at = _mm512_load_si512(positions);
    for (int r = span.from; r < span.to; ++r) {
      const int position = sight.position_of(row + r);
      const bool is_past = !a_.rules.is_causal || position <= first;
      const bool is_near = window == 0 || position < sinks || position > last - window;
      if (is_past && is_near) continue;
      const __m512i all = _mm512_set1_epi32(position);
      __mmask16 seen = 0xFFFF;
      if (!is_past) seen &= _mm512_cmple_epi32_mask(all, at);
      if (!is_near) seen &= _mm512_cmpgt_epi32_mask(all, _mm512_sub_epi32(at, _mm512_set1_epi32(window)));
      const __m512 score = _mm512_loadu_ps(scores + r * kTile);
      _mm512_storeu_ps(scores + r * kTile, _mm512_mask_mov_ps(_mm512_set1_ps(kMinusInfinity), seen, score));
    }
  }

  // Values times weights of a pair of panels, to what they have gathered: [panel, number, query].
  void add(int pair, Span span) {
    const int n_steps = static_cast<int>(whole_steps(span.to)) - span.from / kDeep;
    const BFloat* const weights = weights_ + std::ptrdiff_t{span.from} * kOf * kTile;
    for (std::ptrdiff_t d = 0; d < sizes_.v_width; d += kTiledPair) {
      float* const to = sums_ + std::ptrdiff_t{pair} * 2 * sizes_.sum_panel + d * kTile;
      float* const other = to + sizes_.sum_panel;
      for (int part = 0; part < kRowParts; ++part) {
        tiles_.multiply<1, kOf>({value_rows(part, d) + span.from, kTiledTileRows, weights, weights + sizes_.weight_panel, kPanelPitch, n_steps},
                                {to, other, kTile}, true);
      }
    }
  }

  const AttentionArguments& a_;
  Tiles tiles_;  // of the thread
  Sizes sizes_;
  BFloat *queries_, *weights_, *keys_, *values_, *split_values_;
  float *scores_, *sums_, *top_, *sum_, *unpacked_;
  int sequence_ = 0, head_ = 0, from_ = 0, m_ = 0, n_pairs_ = 0;
};

}  // namespace stratakv::STRATAKV_ISA
