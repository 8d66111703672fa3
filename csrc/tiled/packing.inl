// Vectors as panels of 16 columns, with which rows are multiplied as they lie.
#pragma once

#include <cstddef>

#include "isa/partial.h"
#include "tiled/parts.h"

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

}  // namespace stratakv::STRATAKV_ISA
