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
  bool are_full = true;  // all rows of all tiles are wanted, so that their weights lie side by side

  void clear() {
    n_tiles = 0;
    are_full = true;
  }
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
      are_full = are_full && own == kLanes;
      row += own;
      at += own;
    }
  }
  Vec parameter(int t, int which, int part) const { return Vec::load(tiles[t].parameters + which * kLanes + part * Vec::kWidth); }

  // Of weights, those of all tiles' rows in their lanes, and 0 in all others: where they lie, or in `memory`.
  const float* lanes_of(const float* weights, float* memory) const {
    if (are_full) return weights + tiles[0].at;
    for (int t = 0; t < n_tiles; ++t) {
      float* const lanes = memory + t * kLanes;
      fill(lanes, kLanes, 0.0f);
      copy(weights + tiles[t].at, tiles[t].n, lanes + tiles[t].lane);
    }
    return memory;
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
  alignas(64) std::int8_t digits[2][kMostTiles * kLanes];  // the high ones and the low ones, or the only ones

  Ints four(int digit, int at) const {
    std::int32_t word;
    std::memcpy(&word, digits[digit] + 4 * at, sizeof word);
    return Ints::all(word);
  }
};

// Weights times the parameters of group g, of all queries at once: parameters are the same, and each waits for its largest number.
template <typename F, int kQueries>
inline void weigh(const ValueTiles<F>& rows, int dim, int g, const float* weights, Weights (&out)[kQueries]) {
  alignas(64) float scaled[kQueries][kMostTiles * kLanes];
  const float* lanes[kQueries];
  Vec largest[kQueries], lowest[kQueries], total[kQueries];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    lanes[m] = rows.lanes_of(weights + m * kTileRows, scaled[m]);
    largest[m] = lowest[m] = total[m] = Vec::zero();
  }
  for (int t = 0; t < rows.n_tiles; ++t) {
    for (int part = 0; part < kPieces; ++part) {
      const Vec step = rows.parameter(t, g, part), low = F::kAffine ? rows.parameter(t, PackedValues<F>::groups(dim) + g, part) : Vec::zero();
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        const int at = t * kLanes + part * Vec::kWidth;
        const Vec weight = Vec::load(lanes[m] + at), product = weight * where_seen(weight, step);
        if constexpr (F::kAffine) lowest[m] = Vec::fma(weight, where_seen(weight, low), lowest[m]);
        largest[m] = Vec::max(product, largest[m]);
        total[m] = total[m] + product;
        product.store(scaled[m] + at);
      }
    }
  }
  constexpr float kRange = F::kDigits == 1 ? kMostCount : kMostDigits;
  const int n = rows.n_tiles * kLanes;
  const float* numbers[kQueries];
  std::int8_t* to[kQueries];
  Vec factor[kQueries], digits[kQueries];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    const float most = largest[m].largest();
    out[m].scale = from_digits(most, kRange);
    factor[m] = Vec::all(to_digits(most, kRange));
    numbers[m] = scaled[m];
    to[m] = out[m].digits[0];
  }
  store_whole<F::kDigits, false, kQueries>(numbers, n, factor, to, sizeof out[0].digits[0], digits);
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    float sums[4];
    Vec::store_sums(digits[m], total[m], lowest[m], lowest[m], sums);
    out[m].scale += 0.0f * sums[1];  // what is no number stays none
    out[m].lowest = F::kAffine ? sums[2] + F::kMiddle * (sums[1] - sums[0] * out[m].scale) : -128.0f * sums[0] * out[m].scale;
  }
}

// values[m] = values[m] * decay[m] + sum over r of weights[m][r] * row r, rotated as the rows are.
template <IsFloating F, int kQueries>
inline void add_values(const ValueTiles<F>& rows, int dim, const float* weights, const float* decay, float* values, std::ptrdiff_t stride,
                       bool fetches) {
  alignas(64) float scaled[kQueries][kMostTiles * kLanes];
  for (int m = 0; m < kQueries; ++m) {
    const float* const lanes = rows.lanes_of(weights + m * kTileRows, scaled[m]);
    for (int at = 0; at < rows.n_tiles * kLanes; at += Vec::kWidth) {
      const Vec weight = Vec::load(lanes + at);
      (weight * where_seen(weight, rows.parameter(at / kLanes, 0, at % kLanes / Vec::kWidth))).store(scaled[m] + at);
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
  Ints sums[kQueries][F::kFields][kRegisters][F::kDigits];
  STRATAKV_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    STRATAKV_UNROLL
    for (int i = 0; i < F::kFields; ++i) {
      STRATAKV_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        STRATAKV_UNROLL
        for (Ints& sum : sums[m][i][r]) sum = Ints::zero();
      }
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
          STRATAKV_UNROLL
          for (int i = 0; i < F::kDigits; ++i) {
            const Ints digits = weights[m].four(i, 4 * t + four);
            STRATAKV_UNROLL
            for (int r = 0; r < kRegisters; ++r) {
              Ints& sum = sums[m][kField][r][i];  // counts have no sign, codes of few bits may have one
              sum = F::kDigits == 1 ? Ints::dot(sum, digits, codes[r]) : Ints::dot(sum, codes[r], digits);
            }
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
        store_up_to(Vec::fma(joined(sums[m][i][r]).floats(), scale, Vec::fma(load_up_to(to, n), left, lowest)), to, n);
      }
    }
  }
}

// Of one group of channels, as many queries at once as have their sums in registers.
template <typename F, int kQueries>
inline void add_group(const ValueTiles<F>& rows, int dim, int g, const Weights* weights, const float* decay, float* values, std::ptrdiff_t stride,
                      bool fetches) {
  constexpr int kSums = Vec::kRegisters >= 32 ? 16 : 8;  // beside codes and digits; of more the compiler keeps some in memory
  constexpr int kMost = larger(1, kSums / (F::kDigits * F::kFields));
  if constexpr (kQueries > kMost) {
    constexpr int kFirst = (kQueries + 1) / 2;
    add_group<F, kFirst>(rows, dim, g, weights, decay, values, stride, fetches);
    add_group<F, kQueries - kFirst>(rows, dim, g, weights + kFirst, decay + kFirst, values + kFirst * stride, stride, false);
  } else {
    constexpr int kRegisters = kSums / (F::kDigits * F::kFields * kQueries);
    const int own = PackedValues<F>::words_of(dim, g);
    int word = 0;
    const auto add = [&](auto count) {
      constexpr int kWords = decltype(count)::value * Vec::kWidth;
      for (; decltype(count)::value == 1 ? word < own : word + kWords <= own; word += kWords) {
        add_words<F, kQueries, decltype(count)::value>(rows, dim, g, word, weights, decay, values, stride, fetches);
      }
    };
    if constexpr (kRegisters >= 4) add(Count<4>{});
    if constexpr (kRegisters >= 2) add(Count<2>{});
    add(Count<1>{});
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
    if (F::kAffine || g == 0) weigh<F, kQueries>(rows, dim, g, weights, parts);
    add_group<F, kQueries>(rows, dim, g, parts, decay, values, stride, fetches);
  }
}

}  // namespace stratakv::STRATAKV_ISA
