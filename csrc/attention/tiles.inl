// The arithmetic over a few rows: scores of queries against keys, and weighted sums of values.
#pragma once

#include <cstddef>

#include "isa/apart.h"
#include "isa/small.h"
#include "isa/vendor.h"

namespace stratakv::STRATAKV_ISA {

// Rows that one step takes: as many as leave their scores in the first cache, since each step has a cost of its own.
constexpr int kTileRows = 128;

// scores[m][r] = query m . key r for kRows keys at a time; queries are arranged for them. Meanwhile kLines lines of 64
// bytes from `ahead` on are fetched with each register of columns.
template <typename K, int kQueries, int kRows, int kLines = 0>
inline void score_tile(const K* keys, int dim, const float* queries, std::ptrdiff_t query_stride, float* scores,
                       std::ptrdiff_t score_stride, const char* ahead = nullptr) {
  Vec sums[kQueries][kRows];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    STRATAKV_UNROLL
    for (int r = 0; r < kRows; ++r) sums[m][r] = Vec::zero();
  }
  int d = 0;
  if constexpr (kApart<K>) {
    for (; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) {
      Vec q[kQueries][2];
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        q[m][0] = Vec::load(queries + m * query_stride + d);
        q[m][1] = Vec::load(queries + m * query_stride + d + Vec::kWidth);
      }
      STRATAKV_UNROLL
      for (int r = 0; r < kRows; ++r) {
        Vec k[2];
        load_each(keys + std::ptrdiff_t{r} * dim + d, k);
        STRATAKV_UNROLL
        for (int i = 0; i < 2; ++i) {
          STRATAKV_UNROLL
          for (int m = 0; m < kQueries; ++m) sums[m][r] = Vec::fma(q[m][i], k[i], sums[m][r]);
        }
      }
    }
  }
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) {
    for (int line = 0; line < kLines; ++line, ahead += 64) __builtin_prefetch(ahead);
    Vec q[kQueries];
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) q[m] = Vec::load(queries + m * query_stride + d);
    STRATAKV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec k = Vec::load(keys + std::ptrdiff_t{r} * dim + d);
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) sums[m][r] = Vec::fma(q[m], k, sums[m][r]);
    }
  }
  if (d < dim) {
    Vec q[kQueries];  // what lies behind the last column may be anything, also no number
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) q[m] = Vec::load_some(queries + m * query_stride + d, dim - d);
    STRATAKV_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec k = Vec::load_some(keys + std::ptrdiff_t{r} * dim + d, dim - d);
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) sums[m][r] = Vec::fma(q[m], k, sums[m][r]);
    }
  }
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    float* row = scores + m * score_stride;
    int r = 0;
    for (; r + 4 <= kRows; r += 4) Vec::store_sums(sums[m][r], sums[m][r + 1], sums[m][r + 2], sums[m][r + 3], row + r);
    for (; r < kRows; ++r) row[r] = sums[m][r].sum();
  }
}

// Before its first score, a query is brought into the order in which keys are loaded.
template <typename K>
inline void arrange([[maybe_unused]] float* query, [[maybe_unused]] int dim) {
  if constexpr (kApart<K>) {
    for (int d = 0; d + 2 * Vec::kWidth <= dim; d += 2 * Vec::kWidth) part(query + d);
  }
}

// Asks for the lines of `n` bytes.
inline void fetch(const void* bytes, std::ptrdiff_t n) {
  const char* line = static_cast<const char*>(bytes);
  for (const char* end = line + n; line < end; line += 64) __builtin_prefetch(line);
}

// Likewise for a part of a page. AMD's wide processors (Zen 4) are asked to bring it into the second cache: what comes into
// the first one takes its few places of waiting, which the loads of the kernel need.
inline void fetch_page(const void* bytes, std::ptrdiff_t n) {
  if (!is_wide_amd()) return fetch(bytes, n);
  const char* line = static_cast<const char*>(bytes);
  for (const char* end = line + n; line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

// What comes next in pages or in rows of weights, or null: far ahead and, where asking once is not enough, once more on the way.
struct Wanted {
  const char *far = nullptr, *near = nullptr;

  // The same, `n` bytes on.
  Wanted on(std::ptrdiff_t n) const { return {far == nullptr ? far : far + n, near == nullptr ? near : near + n}; }
};

// `n` bytes of it from `at` on.
inline void fetch_page(Wanted wanted, std::ptrdiff_t at, std::ptrdiff_t n) {
  if (wanted.far == nullptr) return;
  if (wanted.near == nullptr) return fetch(wanted.far + at, n);
  for (const std::ptrdiff_t end = at + n; at < end; at += 64) {
    __builtin_prefetch(wanted.far + at, 0, 2);
    __builtin_prefetch(wanted.near + at, 0, 2);
  }
}

// How far ahead pages are asked for. Nearer, and steps that are long in computing come too late for it; farther, and it
// leaves the first cache again. In the second cache there is room for more.
inline int pages_ahead() { return is_wide_amd() ? 8192 : 4096; }

// Scores of all rows, kRows at a time.
template <typename K, int kQueries, int kRows>
inline void score_rows_by(const K* keys, int n_rows, int dim, const float* queries, std::ptrdiff_t stride, float* scores,
                          Wanted wanted) {
  int r = 0;
  for (; r + kRows <= n_rows; r += kRows) {
    fetch_page(wanted, r * dim * std::ptrdiff_t{sizeof(K)}, kRows * dim * std::ptrdiff_t{sizeof(K)});
    score_tile<K, kQueries, kRows>(keys + std::ptrdiff_t{r} * dim, dim, queries, stride, scores + r, kTileRows);
  }
  for (; r < n_rows; ++r) score_tile<K, kQueries, 1>(keys + std::ptrdiff_t{r} * dim, dim, queries, stride, scores + r, kTileRows);
}

// Scores of all rows. Of all queries that meet the rows, the first ones fetch as many bytes of what is wanted.
template <typename K, int kQueries>
inline void score_rows(const K* keys, int n_rows, int dim, const float* queries, std::ptrdiff_t stride, float* scores,
                       Wanted wanted) {
  // As many as leave all sums in registers. With 16 of those, three rows for four queries are faster than four, which
  // leave no register free, but for short ones: their sums are then added up one by one.
  constexpr int kRows = Vec::kRegisters >= 32 ? (kQueries <= 2 ? 8 : 4) : (kQueries == 1 ? 8 : 4);
  if constexpr (Vec::kRegisters < 32 && kQueries == 4) {
    if (dim >= 80) return score_rows_by<K, kQueries, 3>(keys, n_rows, dim, queries, stride, scores, wanted);
  }
  score_rows_by<K, kQueries, kRows>(keys, n_rows, dim, queries, stride, scores, wanted);
}

// Registers of columns whose sums add_values has at once.
template <int kQueries>
constexpr int kColumns = Vec::kRegisters >= 32 || kQueries == 2 || kQueries == 3 ? 4 : kQueries == 1 ? 8 : 2;

// values[m][d] = values[m][d] * decay[m] + sum over r of weights[m][r] * V[r][d]. In the end values have to be settled.
template <typename V, int kQueries>
inline void add_values(const V* rows, int n_rows, int dim, const float* weights, const float* decay, float* values,
                       std::ptrdiff_t value_stride, Wanted wanted) {
  constexpr int kVectors = kColumns<kQueries>;
  int d = 0;
  for (; d + kVectors * Vec::kWidth <= dim; d += kVectors * Vec::kWidth) {
    Vec sums[kQueries][kVectors];
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      STRATAKV_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        sums[m][i] = Vec::load(values + m * value_stride + d + i * Vec::kWidth) * Vec::all(decay[m]);
      }
    }
    for (int r = 0; r < n_rows; ++r) {
      if (d == 0) fetch_page(wanted, r * dim * std::ptrdiff_t{sizeof(V)}, dim * std::ptrdiff_t{sizeof(V)});
      Vec w[kQueries];
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) w[m] = Vec::all(weights[m * kTileRows + r]);
      constexpr int kAtOnce = kApart<V> ? 2 : 1;
      STRATAKV_UNROLL
      for (int i = 0; i < kVectors; i += kAtOnce) {
        Vec v[kAtOnce];
        load_each(rows + std::ptrdiff_t{r} * dim + d + i * Vec::kWidth, v);
        STRATAKV_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          STRATAKV_UNROLL
          for (int m = 0; m < kQueries; ++m) sums[m][i + j] = Vec::fma(w[m], v[j], sums[m][i + j]);
        }
      }
    }
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      STRATAKV_UNROLL
      for (int i = 0; i < kVectors; ++i) sums[m][i].store(values + m * value_stride + d + i * Vec::kWidth);
    }
  }
  for (; d < dim; d += Vec::kWidth) {
    const int n = smaller(Vec::kWidth, dim - d);
    Vec sums[kQueries];
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) sums[m] = Vec::load(values + m * value_stride + d) * Vec::all(decay[m]);
    for (int r = 0; r < n_rows; ++r) {
      const V* row = rows + std::ptrdiff_t{r} * dim + d;
      const Vec v = n == Vec::kWidth ? Vec::load(row) : Vec::load_some(row, n);
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) sums[m] = Vec::fma(Vec::all(weights[m * kTileRows + r]), v, sums[m]);
    }
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) sums[m].store(values + m * value_stride + d);
  }
}

// Values in the order in which rows of numbers are added to them.
template <typename V>
inline void unsettle([[maybe_unused]] float* values, [[maybe_unused]] int dim) {
  if constexpr (kApart<V>) {
    constexpr int kAtOnce = kColumns<1> * Vec::kWidth;  // as for any number of queries there
    for (int d = 0; d < dim / kAtOnce * kAtOnce; d += 2 * Vec::kWidth) part(values + d);
  }
}

// Values in the order of their columns.
template <typename V>
inline void settle([[maybe_unused]] float* values, [[maybe_unused]] int dim) {
  if constexpr (kApart<V>) {
    constexpr int kAtOnce = kColumns<1> * Vec::kWidth;  // as for any number of queries there
    for (int d = 0; d < dim / kAtOnce * kAtOnce; d += 2 * Vec::kWidth) join(values + d);
  }
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

template <typename Function>
inline void in_fours(int n, const Function& function) {
  int m = 0;
  for (; m + 4 <= n; m += 4) function(m, Count<4>{});
  switch (n - m) {
    case 3: function(m, Count<3>{}); break;
    case 2: function(m, Count<2>{}); break;
    case 1: function(m, Count<1>{}); break;
    default: break;
  }
}

}  // namespace stratakv::STRATAKV_ISA
