// Rows of few bits, read as they lie: queries and weights become whole numbers, and products of bytes are added up.
//
// A page has its rows in tiles of 16, in the order in which dot products of fours of bytes want them: fours of a row's channels
// for scores, fours of rows for sums of values (see docs/formats.md). Whole numbers of 14 bits are two digits from -64 to 64, whose
// products with bytes fit into 16 bits two at a time, which is what processors without dot products of bytes want. Where queries may
// be rounded, one digit of 8 bits is enough beside rows of fewer: those are ten times as far from what they were.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/arguments.h"
#include "attention/rotation.inl"
#include "attention/tiles.inl"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

constexpr int kLanes = 16;  // rows of a tile
constexpr int kGroup = 128;  // channels of a row that share parameters, where not all do
constexpr int kGroupRows = 64;  // rows that share a channel's parameters, or what is left of a page
constexpr int kMostDim = 1024;
constexpr int kPieces = kLanes / Vec::kWidth;
constexpr int kMostTiles = kTileRows / kLanes + 4;
constexpr float kMostDigits = 64 * 128 + 63;  // of two digits,
constexpr float kMostDigit = 127;             // of one with a sign,
constexpr float kMostCount = 254;             // and of one without, where half of one may be carried over

// Shares of the way from a row's smallest number to its largest that levels may span: formats try the first few of these.
constexpr float kSpread[] = {1.0f, 0.8f, 0.63f};

// How rows of a format are coded, with parameters a row: levels are `scale * (code - 128)`, or, for each 128 channels,
// `lowest + step * code`; or `code` is a float, e4m3. Keys of few bits have `lowest + step * code` for each channel and 64 rows.
enum class Coding { kCentred, kAffine, kFloating, kChannels };

template <int kBitsOf, Coding kCodingOf, int kDigitsOf = 2>
struct Packed {
  static constexpr int kBits = kBitsOf, kFields = 8 / kBitsOf, kSpreads = kBitsOf == 2 ? 3 : 1;
  static constexpr int kDigits = kDigitsOf;  // of queries and weights
  static constexpr Coding kCoding = kCodingOf;
  // Levels are counted from the middle one on, so that what rounding does to queries and weights meets small numbers.
  static constexpr float kMiddle = 0.5f * ((1 << kBits) - 1);
  static constexpr bool kAffine = kCoding == Coding::kAffine, kRotates = kAffine || kCoding == Coding::kCentred;
};
using Float8 = Packed<8, Coding::kFloating>;
using Int8 = Packed<8, Coding::kCentred>;
using Int4 = Packed<4, Coding::kAffine>;
using Int2 = Packed<2, Coding::kAffine>;
using Int4Keys = Packed<4, Coding::kChannels>;
using Int2Keys = Packed<2, Coding::kChannels>;

// Such rows where one digit is enough.
template <typename F>
using Coarse = Packed<F::kBits, F::kCoding, 1>;

template <typename T>
concept IsPacked = requires { T::kBits; };
template <typename T>
concept IsFloating = IsPacked<T> && T::kCoding == Coding::kFloating;

template <typename Function>
inline void each_of_four(const Function& function) {
  function(Count<0>{});
  function(Count<1>{});
  function(Count<2>{});
  function(Count<3>{});
}

// function(Count<i>) for each of the codes in a byte.
template <typename F, typename Function>
inline void each_field(const Function& function) {
  function(Count<0>{});
  if constexpr (F::kFields > 1) function(Count<1>{});
  if constexpr (F::kFields > 2) {
    function(Count<2>{});
    function(Count<3>{});
  }
}

// Rows of a page from `row` on: codes in tiles of 16 rows, and parameters.
template <typename F>
struct PackedRows {
  const char* codes;
  const BFloat* parameters;
  int dim, row;

  PackedRows(const char* page, int dim_of, int block_tokens, int first, std::ptrdiff_t tile_bytes)
      : codes(page),
        parameters(reinterpret_cast<const BFloat*>(page + (block_tokens + kLanes - 1) / kLanes * tile_bytes)),
        dim(dim_of),
        row(first) {}

  static int groups(int dim) { return F::kAffine ? (dim + kGroup - 1) / kGroup : 1; }
  static int n_parameters(int dim) { return F::kAffine ? 2 * groups(dim) : 1; }

  Vec parameter(int tile, int which, int part) const {
    return Vec::load(parameters + (std::ptrdiff_t{tile} * n_parameters(dim) + which) * kLanes + part * Vec::kWidth);
  }
};

// Keys: for each few channels the four bytes of all rows of a tile.
template <typename F>
struct PackedKeys : PackedRows<F> {
  PackedKeys(const char* page, int dim, int block_tokens, int row) : PackedRows<F>(page, dim, block_tokens, row, tile_bytes(dim)) {}

  // Fours of bytes that a row has.
  static int quads(int dim) { return (dim + 4 * F::kFields - 1) / (4 * F::kFields); }
  static std::ptrdiff_t tile_bytes(int dim) { return std::ptrdiff_t{quads(dim)} * 4 * kLanes; }

  Ints load(int tile, int quad, int part) const {
    return Ints::load(this->codes + tile * tile_bytes(this->dim) + (quad * kLanes + part * Vec::kWidth) * 4);
  }
};

// Values: for each four rows of a tile, and each byte that a row has, a word with that byte of the four. The channels of a
// group are cut into as many stretches as a byte has codes.
template <typename F>
struct PackedValues : PackedRows<F> {
  PackedValues(const char* page, int dim, int block_tokens, int row) : PackedRows<F>(page, dim, block_tokens, row, tile_bytes(dim)) {}

  // Of group g, of all before it, and of all.
  static int words_of(int dim, int g) { return (smaller(kGroup, dim - g * kGroup) + F::kFields - 1) / F::kFields; }
  static int word_at(int g) { return g * (kGroup / F::kFields); }
  static int words(int dim) { return word_at((dim - 1) / kGroup) + words_of(dim, (dim - 1) / kGroup); }
  static std::ptrdiff_t tile_bytes(int dim) { return std::ptrdiff_t{words(dim)} * kLanes; }
};

// A line of what is wanted. Rows of fewer than 8 bits gain nothing by being asked for twice.
template <typename F>
inline void fetch_line(Wanted wanted, std::ptrdiff_t at) {
  if (wanted.far != nullptr) __builtin_prefetch(wanted.far + at, 0, 2);
  if (F::kBits == 8 && wanted.near != nullptr) __builtin_prefetch(wanted.near + at, 0, 2);
}

template <typename F>
inline const char* place_of(const PackedKeys<F>& rows) {
  return rows.codes + rows.row * PackedKeys<F>::tile_bytes(rows.dim) / kLanes;
}
template <typename F>
inline const char* place_of(const PackedValues<F>& rows) {
  return rows.codes + rows.row * PackedValues<F>::tile_bytes(rows.dim) / kLanes;
}

// A query as digits, four channels after the other; its scale, and what is to be added to sums of their products.
struct Digits {
  const std::int32_t* of[2];  // the high ones and the low ones, or the only ones
  float scale;
  std::int32_t offset;  // before they are scaled
  float base;           // afterwards
};

// What sums of products with each digit stand for.
template <int kDigits>
inline Ints joined(const Ints (&sums)[kDigits]) {
  if constexpr (kDigits == 1) return sums[0];
  else return Ints::joined(sums[0], sums[1]);
}

// The factor that makes whole numbers up to `range` of those whose largest is `most`, and its inverse. Both are normal numbers.
constexpr float kLeast = 2e-34f;
inline float to_digits(float most, float range) { return range / larger(most, kLeast); }
inline float from_digits(float most, float range) { return larger(most, kLeast) * (1.0f / range); }

// Numbers times `factor` as whole numbers of two digits, which it returns.
inline Vec store_digits_one(const float* x, Vec factor, std::int8_t* high, std::int8_t* low) {
  const Vec whole = Vec::round(Vec::load(x) * factor), top = Vec::round(whole * Vec::all(1.0f / 128));
  top.store_bytes(high);
  Vec::fma(top, Vec::all(-128.0f), whole).store_bytes(low);
  return whole;
}

// Whole registers of them; returns the sums of those that have the same place in one.
inline Vec store_digits(const float* x, int n, Vec factor, std::int8_t* high, std::int8_t* low) {
  Vec sum = Vec::zero();
  int i = 0;
#ifdef __AVX512F__
  for (; i + 64 <= n; i += 64) sum = sum + store_digits(x + i, factor, high + i, low + i);
#endif
  for (; i < n; i += Vec::kWidth) sum = sum + store_digits_one(x + i, factor, high + i, low + i);
  return sum;
}

// Where the sums of a register's places begin: all between -1/2 and 1/2, neighbours far apart.
template <int kWidth>
struct Starts {
  alignas(64) float at[kWidth]{};
  constexpr Starts() {
    for (int i = 0; i < kWidth; ++i) {
      int turned = 0;
      for (int bit = 1; bit < kWidth; bit *= 2) turned = 2 * turned + ((i & bit) != 0);
      at[i] = (turned + 0.5f) / kWidth - 0.5f;
    }
  }
};
template <int kWidth>
constexpr Starts<kWidth> kStarts{};

// Of kOf queries, numbers times a factor as whole numbers of one digit, and sums as above. Those without a sign are weights, and each
// is what the rounded sum of its place in a register is more than before it: many small weights beside a large one would otherwise
// all become 0, and their sum with them. Sums that began alike would reach the next whole number in the same rows.
template <bool kHasSign, int kOf>
inline void store_digit(const float* const (&x)[kOf], int n, const Vec (&factor)[kOf], std::int8_t* const (&to)[kOf], Vec (&sums)[kOf]) {
  Vec exact[kOf];
  STRATAKV_UNROLL
  for (int m = 0; m < kOf; ++m) {
    exact[m] = Vec::load(kStarts<Vec::kWidth>.at);
    sums[m] = Vec::zero();
  }
  const auto next = [&](int m, int i) {
    if constexpr (kHasSign) {
      const Vec whole = Vec::round(Vec::load(x[m] + i) * factor[m]);
      sums[m] = sums[m] + whole;
      return whole;
    } else {
      exact[m] = Vec::fma(Vec::load(x[m] + i), factor[m], exact[m]);
      const Vec before = sums[m];
      sums[m] = Vec::round(exact[m]);
      return sums[m] - before;
    }
  };
  int i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
    Vec whole[kOf][4];
    STRATAKV_UNROLL
    for (int j = 0; j < 4; ++j) {
      STRATAKV_UNROLL
      for (int m = 0; m < kOf; ++m) whole[m][j] = next(m, i + j * Vec::kWidth);
    }
    STRATAKV_UNROLL
    for (int m = 0; m < kOf; ++m) Vec::store_four<kHasSign>(whole[m], to[m] + i);
  }
  for (; i < n; i += Vec::kWidth) {
    STRATAKV_UNROLL
    for (int m = 0; m < kOf; ++m) kHasSign ? next(m, i).store_bytes(to[m] + i) : next(m, i).store_counts(to[m] + i);
  }
}

// In so many digits, of which the low ones lie `low` bytes behind the high ones.
template <int kDigits, bool kHasSign, int kOf>
inline void store_whole(const float* const (&x)[kOf], int n, const Vec (&factor)[kOf], std::int8_t* const (&to)[kOf], std::ptrdiff_t low,
                        Vec (&sums)[kOf]) {
  if constexpr (kDigits == 1) return store_digit<kHasSign, kOf>(x, n, factor, to, sums);
  else for (int m = 0; m < kOf; ++m) sums[m] = store_digits(x[m], n, factor[m], to[m], to[m] + low);
}

// What stands in each register, added up; there are at most four.
template <int kOf>
inline void add_up(const Vec (&x)[kOf], float* sums) {
  Vec all[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  STRATAKV_UNROLL
  for (int m = 0; m < kOf; ++m) all[m] = x[m];
  float out[4];
  Vec::store_sums(all[0], all[1], all[2], all[3], out);
  for (int m = 0; m < kOf; ++m) sums[m] = out[m];
}

// A scaled query in the memory where it lies: rotated and as digits, where those are the same for all rows. Behind them
// stand their scale and their sum.
template <typename F>
inline void digitise(float* query, int dim) {
  rotate(query, dim);
  alignas(64) std::int8_t digits[2 * kMostDim];
  Vec largest = Vec::zero(), total = Vec::zero();
  for (int d = 0; d < dim; d += Vec::kWidth) {
    largest = Vec::max(Vec::load(query + d).size(), largest);
    total = total + Vec::load(query + d);
  }
  const int n = static_cast<int>(padded(dim));
  const float most = largest.largest(), sum = store_digits(query, n, Vec::all(to_digits(most, kMostDigits)), digits, digits + n).sum();
  std::memcpy(query, digits, 2 * n);
  query[n / 2] = from_digits(most, kMostDigits) + 0.0f * total.sum();  // what is no number stays none
  query[n / 2 + 1] = sum;
}

inline Digits digits_of(const float* query, int dim) {
  const std::ptrdiff_t n = padded(dim);
  const std::int32_t* const digits = reinterpret_cast<const std::int32_t*>(query);
  return {{digits, digits + n / 4}, query[n / 2], -128 * static_cast<std::int32_t>(query[n / 2 + 1]), 0.0f};
}

// Queries as they meet a group of rows: each channel times its step, and with all of their lowest levels. All of them at once,
// since each waits for its largest number.
template <typename F, int kQueries>
inline void digits_for(const float* queries, std::ptrdiff_t stride, int dim, const BFloat* parameters, std::int8_t* memory,
                       Digits (&out)[kQueries]) {
  alignas(64) float stepped[kQueries][kMostDim];
  Vec base[kQueries], largest[kQueries];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) base[m] = largest[m] = Vec::zero();
  for (int d = 0; d < padded(dim); d += Vec::kWidth) {
    const int n = larger(dim - d, 0);
    const Vec step = load_up_to(parameters + d, n), level = Vec::fma(step, Vec::all(F::kMiddle), load_up_to(parameters + dim + d, n));
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const Vec query = Vec::load(queries + m * stride + d);
      base[m] = Vec::fma(query, level, base[m]);
      const Vec product = query * step;
      largest[m] = Vec::max(product.size(), largest[m]);
      product.store(stepped[m] + d);
    }
  }
  float scale[kQueries], sum[kQueries], of_base[kQueries];
  add_up(base, of_base);
  constexpr float kRange = F::kDigits == 1 ? kMostDigit : kMostDigits;
  const int n = static_cast<int>(padded(dim));
  const float* numbers[kQueries];
  std::int8_t* to[kQueries];
  Vec factor[kQueries], sums[kQueries];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    const float most = largest[m].largest();
    scale[m] = from_digits(most, kRange);
    factor[m] = Vec::all(to_digits(most, kRange));
    numbers[m] = stepped[m];
    to[m] = memory + m * (F::kDigits * kMostDim);
  }
  store_whole<F::kDigits, true, kQueries>(numbers, n, factor, to, n, sums);
  add_up(sums, sum);
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    const std::int32_t* const digits = reinterpret_cast<const std::int32_t*>(to[m]);
    // A query or a parameter that is no number is one of the base's.
    out[m] = {{digits, digits + n / 4}, scale[m], 0, of_base[m] - F::kMiddle * scale[m] * sum[m]};
  }
}

// Queries, before their first score.
template <IsPacked F>
inline void arrange(float* query, int dim) {
  if constexpr (F::kCoding == Coding::kCentred) digitise<F>(query, dim);
}

// Values of queries, in the form in which rows are added to them, and back.
template <IsPacked F>
inline void settle(float* values, int dim) {
  if constexpr (F::kRotates) rotate(values, dim);
}
template <IsPacked F>
inline void unsettle(float* values, int dim) {
  settle<F>(values, dim);
}

}  // namespace stratakv::STRATAKV_ISA
