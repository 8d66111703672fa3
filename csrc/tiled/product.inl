// The product that all others are made of: 32 rows as they lie, with two panels of 16 columns that were packed for it.
#pragma once

#include <cstddef>

#include "isa/partial.h"
#include "isa/small.h"
#include "tiled/tiles.h"

namespace stratakv::STRATAKV_ISA {

// bf16 numbers of a packed panel.
template <int kOf>
inline std::ptrdiff_t packed_numbers(std::ptrdiff_t n) {
  return whole_steps(n) * kOf * kTileNumbers;
}

// `n` vectors [n, stride] of `dim` numbers, at most 16, as tiles [step, part, pair of numbers, vector, 2]. Behind the
// last vector and number stand zeros. One part alone is the number rounded to bf16.
template <int kOf>
inline void pack_panel(const float* x, std::ptrdiff_t stride, int n, int dim, BFloat* to) {
  for (int d = 0; d < dim; d += kDeep, to += kOf * kTileNumbers) {
    Vec high[kTile], low[kTile];
    for (int i = 0; i < kTile; ++i) {
      if (i >= n) {
        high[i] = low[i] = Vec::zero();
        continue;
      }
      const float* const from = x + i * stride + d;
      const int some = dim - d;
      const Vec second = some > Vec::kWidth ? load_up_to(from + Vec::kWidth, some - Vec::kWidth) : Vec::zero();
      const Split parts = split(load_up_to(from, some).v, second.v);
      high[i].v = _mm512_castsi512_ps(parts.high);
      low[i].v = _mm512_castsi512_ps(parts.low);
    }
    Vec::transpose(high);
    for (int i = 0; i < kTile; ++i) high[i].store(reinterpret_cast<float*>(to) + i * kTile);
    if constexpr (kOf == 1) continue;
    Vec::transpose(low);
    for (int i = 0; i < kTile; ++i) low[i].store(reinterpret_cast<float*>(to + kTileNumbers) + i * kTile);
  }
}

// bf16 rows for tiles to read.
struct TiledRows {
  const BFloat* first;
  std::ptrdiff_t stride;  // numbers
};

// 32 rows with the panels a and b, over `n_steps` steps, to sums [row, 16] of either. `adds`: to what is there.
template <int kOf>
inline void multiply(Tiles& tiles, const TiledRows& rows, const BFloat* a, const BFloat* b, std::ptrdiff_t n_steps, float* to_a, float* to_b,
                     bool adds) {
  tiles.multiply<1, kOf>({rows.first, rows.stride, a, b, kOf * kTileNumbers, n_steps}, {to_a, to_b, kTile}, adds);
}

}  // namespace stratakv::STRATAKV_ISA
