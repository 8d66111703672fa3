// bf16 rows that meet queries and weights in bf16: one instruction adds up the products of pairs of numbers.
//
// Where it has its full rate (AMD from Zen 4 on) that is twice as many products as fp32 multiply-adds make, and rows need not
// be widened. Where Intel's processors have tile registers it has half of that, and the plain kernel is as good or better.
// Scores are scaled behind their sums, weights rounded behind the softmax, whose sum has them as they were: where many are
// equal, all are rounded to the same side, up to half a unit of a bf16 output. Numbers below 2^-126 may count as 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention/arguments.h"
#include "attention/formats.inl"
#include "attention/tiles.inl"
#include "isa/apart.h"
#include "isa/partial.h"
#include "isa/small.h"
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
#include "isa/pairs.h"
#define STRATAKV_HAS_PAIRS
#endif

namespace stratakv::STRATAKV_ISA {

#ifdef STRATAKV_HAS_PAIRS
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// A bf16 number of a row that takes part in pairs.
struct Paired {
  std::uint16_t bits;
};

template <typename T>
concept IsPaired = std::is_same_v<T, Paired>;

// What the rows are multiplied with when they are added up.
template <typename V>
using WeightOf = std::conditional_t<IsPaired<V>, BFloat, float>;

// Scores of a tile's rows are scaled, where queries of such keys were not.
template <typename K>
inline void scale_scores(float*, int, float) {}

// Weights of a tile's rows, which were floats, in that type.
template <typename V>
inline void round_weights(float*, int) {}

// What becomes of a call's queries and weights. An output in 16 bits is not made better by more exact ones.
struct Rounding {
  bool in_pairs;  // bf16 where rows are
  bool to_digit;  // one digit where rows have few bits; beside many channels the rounding of all could be half of one wide channel's

  explicit Rounding(const AttentionArguments& a)
      : in_pairs(kHasPairs && (a.rounds || a.query_type == NumberType::kBFloat)),
        to_digit((a.rounds_to_digit || a.query_type != NumberType::kFloat) && a.pages.k_dim <= kGroup) {}
};

// As in formats.inl, but for those.
template <typename Function>
inline void with_keys(NumberType type, Rounding rounding, const Function& function) {
  if constexpr (kHasPairs) {
    if (rounding.in_pairs && type == NumberType::kBFloat) return function(Paired{});
  }
  if (rounding.to_digit && type == NumberType::kInt4) return function(Coarse<Int4Keys>{});
  if (rounding.to_digit && type == NumberType::kInt2) return function(Coarse<Int2Keys>{});
  with_keys(type, function);
}
template <typename Function>
inline void with_values(NumberType type, Rounding rounding, const Function& function) {
  if constexpr (kHasPairs) {
    if (rounding.in_pairs && type == NumberType::kBFloat) return function(Paired{});
  }
  if (rounding.to_digit && type == NumberType::kInt4) return function(Coarse<Int4>{});
  if (rounding.to_digit && type == NumberType::kInt2) return function(Coarse<Int2>{});
  with_values(type, function);
}

#ifdef STRATAKV_HAS_PAIRS

// Numbers from one query's weights to the next one's.
constexpr std::ptrdiff_t kWeightStride = 2 * kTileRows;

// `n` floats become bf16 numbers where they lie. There is room for whole registers of either.
inline void round_in_place(float* numbers, int n) {
  for (int i = 0; i < n; i += kDeep) {
    const __m512 second = n - i > Vec::kWidth ? _mm512_loadu_ps(numbers + i + Vec::kWidth) : _mm512_setzero_ps();
    _mm512_storeu_si512(numbers + i / 2, (__m512i)_mm512_cvtne2ps_pbh(second, _mm512_loadu_ps(numbers + i)));
  }
}

template <IsPaired K>
inline void scale_scores(float* scores, int n, float scale) {
  for (int r = 0; r < n; r += Vec::kWidth) (Vec::load(scores + r) * Vec::all(scale)).store(scores + r);
}

template <IsPaired V>
inline void round_weights(float* weights, int n) {
  round_in_place(weights, n);
}

template <IsPaired K>
inline void arrange(float* query, int dim) {
  round_in_place(query, dim);
}

// Of few registers the queries stay in registers of their own, so that keys are read as they lie, which memory wants; of
// others (kRegisters = 0) they are read again for each row.
template <int kQueries, int kRegisters>
inline void score_paired(const Paired* keys, int n_rows, int dim, const float* queries, std::ptrdiff_t stride, float* scores,
                         Wanted wanted) {
  __m512i held[kQueries][larger(kRegisters, 1)];
  const auto query = [&](int m, int d, int n) { return some_numbers(reinterpret_cast<const BFloat*>(queries + m * stride) + d, n); };
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries && kRegisters > 0; ++m) {
    STRATAKV_UNROLL
    for (int i = 0; i < kRegisters; ++i) held[m][i] = query(m, i * kDeep, kDeep);
  }
  const auto score = [&](const Paired* key, Vec (&sums)[kQueries]) {
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) sums[m] = Vec::zero();
    if constexpr (kRegisters > 0) {
      STRATAKV_UNROLL
      for (int i = 0; i < kRegisters; ++i) {
        const __m512i k = some_numbers(key + i * kDeep, kDeep);
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) sums[m].v = dot(sums[m].v, held[m][i], k);
      }
    } else {
      for (int d = 0; d < dim; d += kDeep) {
        const __m512i k = some_numbers(key + d, dim - d);
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) sums[m].v = dot(sums[m].v, query(m, d, dim - d), k);
      }
    }
  };
  const std::ptrdiff_t row_bytes = dim * std::ptrdiff_t{sizeof(Paired)};
  int r = 0;
  for (; r + 4 <= n_rows; r += 4, keys += 4 * std::ptrdiff_t{dim}) {
    fetch_page(wanted, r * row_bytes, 4 * row_bytes);
    Vec sums[4][kQueries];
    STRATAKV_UNROLL
    for (int i = 0; i < 4; ++i) score(keys + i * std::ptrdiff_t{dim}, sums[i]);
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) Vec::store_sums(sums[0][m], sums[1][m], sums[2][m], sums[3][m], scores + m * kTileRows + r);
  }
  for (; r < n_rows; ++r, keys += dim) {
    Vec sums[kQueries];
    score(keys, sums);
    for (int m = 0; m < kQueries; ++m) scores[m * kTileRows + r] = sums[m].sum();
  }
}

template <IsPaired K, int kQueries>
inline void score_rows(const K* keys, int n_rows, int dim, const float* queries, std::ptrdiff_t stride, float* scores,
                       Wanted wanted) {
  switch (dim) {
    case 2 * kDeep: return score_paired<kQueries, 2>(keys, n_rows, dim, queries, stride, scores, wanted);
    case 3 * kDeep: return score_paired<kQueries, 3>(keys, n_rows, dim, queries, stride, scores, wanted);
    case 4 * kDeep: return score_paired<kQueries, 4>(keys, n_rows, dim, queries, stride, scores, wanted);
    default: return score_paired<kQueries, 0>(keys, n_rows, dim, queries, stride, scores, wanted);
  }
}

// Registers of sums that add_some has, beside rows and weights.
constexpr int kMostSums = 18;

// kRegisters of each row's columns. Two rows side by side are pairs, whose columns come out in the order that `settle` ends.
// All of the first row is read before the second one, since memory is fastest in the order in which it lies.
template <int kQueries, int kRegisters>
inline void add_some(const Paired* rows, int n_rows, int dim, const BFloat* weights, const float* decay, float* values,
                     std::ptrdiff_t value_stride, Wanted wanted) {
  constexpr int kSums = 2 * kRegisters;
  Vec sums[kQueries][kSums];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    STRATAKV_UNROLL
    for (int i = 0; i < kSums; ++i) sums[m][i] = Vec::load(values + m * value_stride + i * Vec::kWidth) * Vec::all(decay[m]);
  }
  const std::ptrdiff_t row_bytes = dim * std::ptrdiff_t{sizeof(Paired)};
  const auto add = [&](int r, auto count) {
    constexpr int kRows = decltype(count)::value;
    fetch_page(wanted, r * row_bytes, kRows * row_bytes);
    const Paired* const row = rows + std::ptrdiff_t{r} * dim;
    __m512i first[kRegisters], pairs[kQueries];
    STRATAKV_UNROLL
    for (int i = 0; i < kRegisters; ++i) first[i] = _mm512_loadu_si512(row + i * kDeep);
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      pairs[m] = pair_at(weights + m * kWeightStride + r);
      if (kRows == 1) pairs[m] = _mm512_and_si512(pairs[m], _mm512_set1_epi32(0xFFFF));
    }
    STRATAKV_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      const __m512i second = kRows == 1 ? _mm512_setzero_si512() : _mm512_loadu_si512(row + dim + i * kDeep);
      const __m512i low = _mm512_unpacklo_epi16(first[i], second), high = _mm512_unpackhi_epi16(first[i], second);
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        sums[m][2 * i].v = dot(sums[m][2 * i].v, low, pairs[m]);
        sums[m][2 * i + 1].v = dot(sums[m][2 * i + 1].v, high, pairs[m]);
      }
    }
  };
  int r = 0;
  for (; r + 2 <= n_rows; r += 2) add(r, Count<2>{});
  if (r < n_rows) add(r, Count<1>{});
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    STRATAKV_UNROLL
    for (int i = 0; i < kSums; ++i) sums[m][i].store(values + m * value_stride + i * Vec::kWidth);
  }
}

// For all queries: those that find no room find the rows in the first cache.
template <int kQueries, int kRegisters>
inline void add_paired(const Paired* rows, int n_rows, int dim, const BFloat* weights, const float* decay, float* values,
                       std::ptrdiff_t value_stride, Wanted wanted) {
  constexpr int kAtOnce = smaller(kQueries, kMostSums / (2 * kRegisters));
  add_some<kAtOnce, kRegisters>(rows, n_rows, dim, weights, decay, values, value_stride, wanted);
  if constexpr (kQueries > kAtOnce) {
    add_paired<kQueries - kAtOnce, kRegisters>(rows, n_rows, dim, weights + kAtOnce * kWeightStride, decay + kAtOnce,
                                               values + kAtOnce * value_stride, value_stride, {});
  }
}

template <IsPaired V, int kQueries>
inline void add_values(const V* rows, int n_rows, int dim, const BFloat* weights, const float* decay, float* values,
                       std::ptrdiff_t value_stride, Wanted wanted) {
  int d = 0;
  const auto add = [&](auto registers) {
    constexpr int kRegisters = decltype(registers)::value;
    add_paired<kQueries, kRegisters>(rows + d, n_rows, dim, weights, decay, values + d, value_stride, d == 0 ? wanted : Wanted{});
    d += kRegisters * kDeep;
  };
  while (d + 4 * kDeep <= dim) add(Count<4>{});
  switch ((dim - d) / kDeep) {
    case 3: add(Count<3>{}); break;
    case 2: add(Count<2>{}); break;
    case 1: add(Count<1>{}); break;
    default: break;
  }
  for (; d < dim; d += Vec::kWidth) {  // fewer than a register's
    for (int m = 0; m < kQueries; ++m) {
      float* const to = values + m * value_stride + d;
      Vec sum = Vec::load(to) * Vec::all(decay[m]);
      for (int r = 0; r < n_rows; ++r) {
        const BFloat* const row = reinterpret_cast<const BFloat*>(rows) + std::ptrdiff_t{r} * dim + d;
        const Vec weight = {_mm512_castsi512_ps(_mm512_slli_epi32(pair_at(weights + m * kWeightStride + r), 16))};
        sum = Vec::fma(weight, load_up_to(row, dim - d), sum);
      }
      sum.store(to);
    }
  }
}

// Fours of columns in turns, a register of the first ones and one of the others; and back.
template <IsPaired V>
inline void unsettle(float* values, int dim) {
  for (int d = 0; d + kDeep <= dim; d += kDeep) {
    reorder(values + d, _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), 4);
  }
}
template <IsPaired V>
inline void settle(float* values, int dim) {
  for (int d = 0; d + kDeep <= dim; d += kDeep) {
    reorder(values + d, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), 8);
  }
}

#endif

}  // namespace stratakv::STRATAKV_ISA
