// Sums of values of few bits: weights, times what rows have as parameters, become digits, and the rows' fours are turned, so
// that one holds a channel of four rows.
#pragma once

#include <cstddef>
#include <cstdint>

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
    const char* ahead;  // what is fetched meanwhile, or null
    int lane, at, n;
  };
  Tile tiles[kMostTiles];
  int n_tiles = 0;

  bool has_room(int n_rows) const { return n_tiles + n_rows / kLanes + 2 <= kMostTiles; }

  // `n` rows, whose weights begin at `at`.
  void add(const PackedRows<F>& rows, int n, int at, const char* ahead) {
    const std::ptrdiff_t tile_bytes = std::ptrdiff_t{PackedRows<F>::quads(rows.dim)} * 4 * kLanes;
    for (int row = rows.row, end = row + n; row < end;) {
      const int tile = row / kLanes, lane = row % kLanes, own = smaller(kLanes - lane, end - row);
      tiles[n_tiles++] = {rows.codes + tile * tile_bytes,
                          rows.parameters + std::ptrdiff_t{tile} * PackedRows<F>::n_parameters(rows.dim) * kLanes,
                          ahead == nullptr ? nullptr : ahead + (tile - rows.row / kLanes) * tile_bytes,
                          lane,
                          at,
                          own};
      row += own;
      at += own;
    }
  }
  Ints load(int t, int quad, int part) const { return Ints::load(tiles[t].codes + (quad * kLanes + part * Vec::kWidth) * 4); }
  Vec parameter(int t, int which, int part) const { return Vec::load(tiles[t].parameters + which * kLanes + part * Vec::kWidth); }

  // Of weights, those of the tiles' rows in their lanes, and 0 in all others.
  void spread(const float* weights, float* lanes) const {
    for (int t = 0; t < n_tiles; ++t, lanes += kLanes) {
      if (tiles[t].n < kLanes) fill(lanes, kLanes, 0.0f);
      copy(weights + tiles[t].at, tiles[t].n, lanes + tiles[t].lane);
    }
  }
};

// Weights of rows as digits, as sums over rows want them.
struct Weights {
  float scale, lowest;  // of the sums, and what is added to each
  alignas(64) std::int8_t digits[2][kMostTiles][4 * kLanes];
};

// Weights times the parameters of group g.
template <typename F>
inline void weigh(const ValueTiles<F>& rows, int dim, int g, const float* weights, Weights& out) {
  alignas(64) float scaled[kMostTiles * kLanes];
  rows.spread(weights, scaled);
  Vec largest = Vec::zero(), lowest = Vec::zero(), total = Vec::zero();
  for (int t = 0; t < rows.n_tiles; ++t) {
    for (int part = 0; part < kPieces; ++part) {
      float* const at = scaled + t * kLanes + part * Vec::kWidth;
      const Vec weight = Vec::load(at);
      const Vec product = weight * where_seen(weight, rows.parameter(t, g, part));
      if constexpr (F::kAffine) {
        lowest = Vec::fma(weight, where_seen(weight, rows.parameter(t, PackedRows<F>::groups(dim) + g, part)), lowest);
        lowest = Vec::fma(product, Vec::all(F::kMiddle), lowest);
      }
      largest = Vec::max(product, largest);
      total = total + product;
      product.store(at);
    }
  }
  const float most = largest.largest();
  const float inverse = to_digits(most);
  alignas(64) std::int8_t digits[2][kMostTiles * kLanes];
  const float sum = store_digits(scaled, rows.n_tiles * kLanes, Vec::all(inverse), digits[0], digits[1]).sum();
  for (int t = 0; t < rows.n_tiles; ++t) {
    for (int part = 0; part < kPieces; ++part) {
      const int at = t * kLanes + part * Vec::kWidth;
      STRATAKV_UNROLL
      for (int digit = 0; digit < 2; ++digit) Ints::spread(digits[digit] + at).store(out.digits[digit][t] + 4 * part * Vec::kWidth);
    }
  }
  out.scale = (most > kLeast ? most / kMostDigits : 0.0f) + 0.0f * total.sum();  // what is no number stays none
  out.lowest = F::kAffine ? lowest.sum() - F::kMiddle * sum * out.scale : -128.0f * sum * out.scale;
}

// values[m] = values[m] * decay[m] + sum over r of weights[m][r] * row r, rotated as the rows are.
template <IsFloating F, int kQueries>
inline void add_values(const ValueTiles<F>& rows, int dim, const float* weights, const float* decay, float* values, std::ptrdiff_t stride,
                       bool fetches) {
  const int n_quads = PackedRows<F>::quads(dim);
  alignas(64) float scaled[kQueries][kMostTiles * kLanes];
  for (int m = 0; m < kQueries; ++m) {
    rows.spread(weights + m * kTileRows, scaled[m]);
    for (int at = 0; at < rows.n_tiles * kLanes; at += Vec::kWidth) {
      const Vec weight = Vec::load(scaled[m] + at);
      (weight * where_seen(weight, rows.parameter(at / kLanes, 0, at % kLanes / Vec::kWidth))).store(scaled[m] + at);
    }
  }
  for (int quad = 0; quad < n_quads; ++quad) {
    Vec sums[kQueries][4];
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      STRATAKV_UNROLL
      for (int i = 0; i < 4; ++i) sums[m][i] = Vec::zero();
    }
    for (int t = 0; t < rows.n_tiles; ++t) {
      if (fetches && rows.tiles[t].ahead != nullptr) __builtin_prefetch(rows.tiles[t].ahead + quad * 4 * kLanes, 0, 2);
      for (int part = 0; part < kPieces; ++part) {
        const Ints bytes = rows.load(t, quad, part);
        Vec weight[kQueries];
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) weight[m] = Vec::load(scaled[m] + t * kLanes + part * Vec::kWidth);
        each_of_four([&](auto byte) {
          constexpr int kByte = decltype(byte)::value;
          const Vec value = bytes.template e4m3<kByte>();
          STRATAKV_UNROLL
          for (int m = 0; m < kQueries; ++m) sums[m][kByte] = Vec::fma(weight[m], value, sums[m][kByte]);
        });
      }
    }
    for (int m = 0; m < kQueries; ++m) {
      float added[4];
      Vec::store_sums(sums[m][0], sums[m][1], sums[m][2], sums[m][3], added);
      float* const to = values + m * stride + 4 * quad;
      for (int i = 0; i < 4; ++i) to[i] = to[i] * decay[m] + added[i];
    }
  }
}

template <typename F, int kQueries>
inline void add_values(const ValueTiles<F>& rows, int dim, const float* weights, const float* decay, float* values, std::ptrdiff_t stride,
                       bool fetches) {
  constexpr int kMost = larger(1, (Vec::kRegisters >= 32 ? 8 : 4) / F::kFields);  // queries whose sums fit into registers
  if constexpr (kQueries > kMost) {
    add_values<F, kMost>(rows, dim, weights, decay, values, stride, fetches);
    add_values<F, kQueries - kMost>(rows, dim, weights + kMost * kTileRows, decay + kMost, values + kMost * stride, stride, false);
  } else {
    constexpr int kWide = Vec::kWidth / 4;  // fours of channels that fill a register
    constexpr int kQuads = larger(1, kWide / F::kFields);
    Weights digits[kQueries];
    int quad = 0;
    for (int t = 0; t < rows.n_tiles && fetches; ++t) {
      const typename ValueTiles<F>::Tile& tile = rows.tiles[t];
      if (tile.ahead != nullptr) fetch(reinterpret_cast<const char*>(tile.parameters) + (tile.ahead - tile.codes), PackedRows<F>::n_parameters(dim) * 32);
    }
    for (int g = 0; g < PackedRows<F>::groups(dim); ++g) {
      for (int m = 0; m < kQueries; ++m) weigh(rows, dim, g, weights + m * kTileRows, digits[m]);
      const int end = PackedRows<F>::quads_to(dim, g);
      for (; quad < end; quad += kQuads) {
        Ints sums[kQueries][kQuads * F::kFields];
        for (int q = 0; q < kQuads; ++q) {
          Ints high[kQueries][F::kFields], low[kQueries][F::kFields];
          STRATAKV_UNROLL
          for (int m = 0; m < kQueries; ++m) {
            STRATAKV_UNROLL
            for (int i = 0; i < F::kFields; ++i) high[m][i] = low[m][i] = Ints::zero();
          }
          for (int t = 0; t < rows.n_tiles && quad + q < end; ++t) {
            if (fetches && rows.tiles[t].ahead != nullptr) __builtin_prefetch(rows.tiles[t].ahead + (quad + q) * 4 * kLanes, 0, 2);
            for (int part = 0; part < kPieces; ++part) {
              const Ints bytes = rows.load(t, quad + q, part).in_fours();
              Ints one[kQueries], two[kQueries];
              STRATAKV_UNROLL
              for (int m = 0; m < kQueries; ++m) {
                one[m] = Ints::load(digits[m].digits[0][t] + 4 * part * Vec::kWidth);
                two[m] = Ints::load(digits[m].digits[1][t] + 4 * part * Vec::kWidth);
              }
              each_field<F>([&](auto field) {
                constexpr int kField = decltype(field)::value;
                const Ints codes = bytes.template field<kField * F::kBits, F::kBits>();
                STRATAKV_UNROLL
                for (int m = 0; m < kQueries; ++m) {
                  high[m][kField] = Ints::dot(high[m][kField], codes, one[m]);
                  low[m][kField] = Ints::dot(low[m][kField], codes, two[m]);
                }
              });
            }
          }
          STRATAKV_UNROLL
          for (int m = 0; m < kQueries; ++m) {
            STRATAKV_UNROLL
            for (int i = 0; i < F::kFields; ++i) sums[m][q * F::kFields + i] = Ints::joined(high[m][i], low[m][i]);
          }
        }
        for (int m = 0; m < kQueries; ++m) {
          const Vec scale = Vec::all(digits[m].scale), lowest = Vec::all(digits[m].lowest), left = Vec::all(decay[m]);
          for (int i = 0; i < kQuads * F::kFields; i += kWide) {
            const int d = (quad * F::kFields + i) * 4;
            if (d >= stride) break;
            Ints fours[kWide];
            STRATAKV_UNROLL
            for (int j = 0; j < kWide; ++j) fours[j] = sums[m][i + j];
            float* const at = values + m * stride + d;
            Vec::fma(sums_of_fours(fours).floats(), scale, Vec::fma(Vec::load(at), left, lowest)).store(at);
          }
        }
      }
      quad = end;
    }
  }
}

}  // namespace stratakv::STRATAKV_ISA
