// Sums of values of few bits: weights, times what rows have as parameters, become digits, four rows' side by side. A register
// has the codes of four rows for many channels, so that no sums across it are left over.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/packed.inl"
#include "attention/tiles.inl"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Parameters of rows that have a weight. Those of others may hold anything, also no number, which a weight of 0 would not
// hide.
inline Vec where_seen(Vec weight, Vec parameter) { return Vec::zero_where_less(weight, Vec::all(1e-37f), parameter); }

// Tiles of values, of one page or several, and which of their rows are wanted: those from `lane` on have the weights from
// `at` on.
template <typename F>
struct ValueTiles {
  struct Tile {
    const char* codes;
    const BFloat* parameters;
    Wanted wanted;  // what is fetched meanwhile
    int lane, at, n;
  };
  Tile tiles[kMostTiles];
  int n_tiles = 0;

  bool has_room(int n_rows) const { return n_tiles + n_rows / kLanes + 2 <= kMostTiles; }

  // `n` rows, whose weights begin at `at`.
  void add(const PackedValues<F>& rows, int n, int at, Wanted wanted) {
    const std::ptrdiff_t tile_bytes = PackedValues<F>::tile_bytes(rows.dim);
    for (int row = rows.row, end = row + n; row < end;) {
      const int tile = row / kLanes, lane = row % kLanes, own = smaller(kLanes - lane, end - row);
      tiles[n_tiles++] = {rows.codes + tile * tile_bytes,
                          rows.parameters + std::ptrdiff_t{tile} * PackedValues<F>::n_parameters(rows.dim) * kLanes,
                          wanted.on((tile - rows.row / kLanes) * tile_bytes),
                          lane,
                          at,
                          own};
      row += own;
      at += own;
    }
  }
  Vec parameter(int t, int which, int part) const { return Vec::load(tiles[t].parameters + which * kLanes + part * Vec::kWidth); }

  // Of weights, those of a tile's rows in their lanes, and 0 in all others.
  Vec weights_of(int t, int part, const float* weights) const {
    const Tile& tile = tiles[t];
    if (tile.n == kLanes) return Vec::load(weights + tile.at + part * Vec::kWidth);
    alignas(64) float lanes[kLanes] = {};
    copy(weights + tile.at, tile.n, lanes + tile.lane);
    return Vec::load(lanes + part * Vec::kWidth);
  }

  // `words` words of 4 bytes from word `at` of a tile on, of which a register takes what it has room for.
  Ints load(int t, int at, int words, bool fetches) const {
    const Tile& tile = tiles[t];
    if (fetches && at % kLanes < Vec::kWidth) fetch_line<F>(tile.wanted, std::ptrdiff_t{at} * 4);
    const char* const from = tile.codes + std::ptrdiff_t{at} * 4;
    return words >= Vec::kWidth ? Ints::load(from) : Ints::load_some(from, words);
  }
};

// Weights of rows as digits, those of four rows in a word.
struct Weights {
  float scale, lowest;  // of the sums, and what is added to each
  alignas(64) std::int8_t digits[2][kMostTiles * kLanes];

  Ints four(int digit, int at) const {
    std::int32_t word;
    std::memcpy(&word, digits[digit] + 4 * at, sizeof word);
    return Ints::all(word);
  }
};

// Weights times the parameters of group g.
template <typename F>
inline void weigh(const ValueTiles<F>& rows, int dim, int g, const float* weights, Weights& out) {
  alignas(64) float scaled[kMostTiles * kLanes];
  Vec largest = Vec::zero(), lowest = Vec::zero(), total = Vec::zero();
  for (int t = 0; t < rows.n_tiles; ++t) {
    for (int part = 0; part < kPieces; ++part) {
      const Vec weight = rows.weights_of(t, part, weights);
      const Vec product = weight * where_seen(weight, rows.parameter(t, g, part));
      if constexpr (F::kAffine) {
        lowest = Vec::fma(weight, where_seen(weight, rows.parameter(t, PackedValues<F>::groups(dim) + g, part)), lowest);
        lowest = Vec::fma(product, Vec::all(F::kMiddle), lowest);
      }
      largest = Vec::max(product, largest);
      total = total + product;
      product.store(scaled + t * kLanes + part * Vec::kWidth);
    }
  }
  const float most = largest.largest();
  const Vec digits = store_digits(scaled, rows.n_tiles * kLanes, Vec::all(to_digits(most)), out.digits[0], out.digits[1]);
  float sums[4];
  Vec::store_sums(digits, total, lowest, lowest, sums);
  out.scale = (most > kLeast ? most / kMostDigits : 0.0f) + 0.0f * sums[1];  // what is no number stays none
  out.lowest = F::kAffine ? sums[2] - F::kMiddle * sums[0] * out.scale : -128.0f * sums[0] * out.scale;
}

// values[m] = values[m] * decay[m] + sum over r of weights[m][r] * row r, rotated as the rows are.
template <IsFloating F, int kQueries>
inline void add_values(const ValueTiles<F>& rows, int dim, const float* weights, const float* decay, float* values, std::ptrdiff_t stride,
                       bool fetches) {
  alignas(64) float scaled[kQueries][kMostTiles * kLanes];
  for (int m = 0; m < kQueries; ++m) {
    for (int at = 0; at < rows.n_tiles * kLanes; at += Vec::kWidth) {
      const int t = at / kLanes, part = at % kLanes / Vec::kWidth;
      const Vec weight = rows.weights_of(t, part, weights + m * kTileRows);
      (weight * where_seen(weight, rows.parameter(t, 0, part))).store(scaled[m] + at);
    }
  }
  for (int d = 0; d < dim; d += Vec::kWidth) {
    Vec sums[kQueries][2];  // two chains, so that one need not wait for the other
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) sums[m][0] = sums[m][1] = Vec::zero();
    for (int four = 0; four < 4 * rows.n_tiles; ++four) {
      const Ints bytes = rows.load(four / 4, four % 4 * dim + d, dim - d, fetches);
      each_of_four([&](auto byte) {
        constexpr int kByte = decltype(byte)::value;
        const Vec value = bytes.template e4m3<kByte>();
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) sums[m][kByte % 2] = Vec::fma(Vec::all(scaled[m][4 * four + kByte]), value, sums[m][kByte % 2]);
      });
    }
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      float* const to = values + m * stride + d;
      Vec::fma(Vec::load(to), Vec::all(decay[m]), sums[m][0] + sums[m][1]).store(to);
    }
  }
}

// Sums over all rows of kRegisters registers of words, and what they stand for.
template <typename F, int kQueries, int kRegisters>
inline void add_words(const ValueTiles<F>& rows, int dim, int g, int word, const Weights* weights, const float* decay, float* values,
                      std::ptrdiff_t stride, bool fetches) {
  const int n_words = PackedValues<F>::words(dim), own = PackedValues<F>::words_of(dim, g), first = PackedValues<F>::word_at(g) + word;
  Ints high[kQueries][F::kFields][kRegisters], low[kQueries][F::kFields][kRegisters];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    STRATAKV_UNROLL
    for (int i = 0; i < F::kFields; ++i) {
      STRATAKV_UNROLL
      for (int r = 0; r < kRegisters; ++r) high[m][i][r] = low[m][i][r] = Ints::zero();
    }
  }
  for (int t = 0; t < rows.n_tiles; ++t) {
    for (int four = 0; four < 4; ++four) {
      Ints bytes[kRegisters];
      STRATAKV_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        bytes[r] = rows.load(t, four * n_words + first + r * Vec::kWidth, kRegisters > 1 ? Vec::kWidth : own - word, fetches);
      }
      each_field<F>([&](auto field) {
        constexpr int kField = decltype(field)::value;
        Ints codes[kRegisters];
        STRATAKV_UNROLL
        for (int r = 0; r < kRegisters; ++r) codes[r] = bytes[r].template field<kField * F::kBits, F::kBits>();
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          const Ints one = weights[m].four(0, 4 * t + four), two = weights[m].four(1, 4 * t + four);
          STRATAKV_UNROLL
          for (int r = 0; r < kRegisters; ++r) {
            high[m][kField][r] = Ints::dot(high[m][kField][r], codes[r], one);
            low[m][kField][r] = Ints::dot(low[m][kField][r], codes[r], two);
          }
        }
      });
    }
  }
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    const Vec scale = Vec::all(weights[m].scale), lowest = Vec::all(weights[m].lowest), left = Vec::all(decay[m]);
    STRATAKV_UNROLL
    for (int i = 0; i < F::kFields; ++i) {
      STRATAKV_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        const int at = word + r * Vec::kWidth, d = g * kGroup + i * own + at, n = smaller(own - at, dim - d);
        if (n <= 0) continue;  // fields that fill up the last word
        float* const to = values + m * stride + d;
        store_up_to(Vec::fma(Ints::joined(high[m][i][r], low[m][i][r]).floats(), scale, Vec::fma(load_up_to(to, n), left, lowest)), to, n);
      }
    }
  }
}

// Of one group of channels, as many queries at once as have their sums in registers.
template <typename F, int kQueries>
inline void add_group(const ValueTiles<F>& rows, int dim, int g, const Weights* weights, const float* decay, float* values, std::ptrdiff_t stride,
                      bool fetches) {
  constexpr int kSums = Vec::kRegisters >= 32 ? 24 : 8;  // beside codes and digits
  constexpr int kMost = larger(1, kSums / (2 * F::kFields));
  if constexpr (kQueries > kMost) {
    constexpr int kFirst = (kQueries + 1) / 2;
    add_group<F, kFirst>(rows, dim, g, weights, decay, values, stride, fetches);
    add_group<F, kQueries - kFirst>(rows, dim, g, weights + kFirst, decay + kFirst, values + kFirst * stride, stride, false);
  } else {
    constexpr int kRegisters = kSums / (2 * F::kFields * kQueries) >= 4 ? 4 : kSums / (2 * F::kFields * kQueries) >= 2 ? 2 : 1;
    const int own = PackedValues<F>::words_of(dim, g);
    int word = 0;
    for (; word + kRegisters * Vec::kWidth <= own; word += kRegisters * Vec::kWidth) {
      add_words<F, kQueries, kRegisters>(rows, dim, g, word, weights, decay, values, stride, fetches);
    }
    for (; word < own; word += Vec::kWidth) add_words<F, kQueries, 1>(rows, dim, g, word, weights, decay, values, stride, fetches);
  }
}

template <typename F, int kQueries>
inline void add_values(const ValueTiles<F>& rows, int dim, const float* weights, const float* decay, float* values, std::ptrdiff_t stride,
                       bool fetches) {
  Weights parts[kQueries];
  for (int t = 0; t < rows.n_tiles && fetches; ++t) {
    const typename ValueTiles<F>::Tile& tile = rows.tiles[t];
    const std::ptrdiff_t parameters = reinterpret_cast<const char*>(tile.parameters) - tile.codes;
    if (tile.wanted.far != nullptr) fetch_page(tile.wanted.far + parameters, PackedValues<F>::n_parameters(dim) * 32);
  }
  for (int g = 0; g * kGroup < dim; ++g) {
    if (F::kAffine || g == 0) {
      for (int m = 0; m < kQueries; ++m) weigh(rows, dim, g, weights + m * kTileRows, parts[m]);
    }
    add_group<F, kQueries>(rows, dim, g, parts, decay, values, stride, fetches);
  }
}

}  // namespace stratakv::STRATAKV_ISA
