// The product that all others are made of: 32 rows as they lie, with two panels of 16 columns that were packed for it.
#pragma once

#include <cstddef>

#include "amx/tiles.h"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Rows at once, and columns of the two panels.
constexpr int kTiledRows = 2 * kTile;
constexpr int kTiledPair = 2 * kTile;

inline std::ptrdiff_t whole_steps(std::ptrdiff_t n) { return (n + kDeep - 1) / kDeep; }
// bf16 numbers of a packed panel.
inline std::ptrdiff_t packed_numbers(std::ptrdiff_t n, int parts = kParts) { return whole_steps(n) * parts * kTileNumbers; }

// `n` vectors [n, stride] of `dim` numbers, at most 16, as tiles [step, part, pair of numbers, vector, 2]. Behind the
// last vector and number stand zeros. One part alone is the number rounded to bf16.
template <int kOf = kParts>
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

  TiledRows from(std::ptrdiff_t step) const { return {first + step * kDeep, stride}; }
};

// Two tiles of sums [row, column], of the first and the second 16 rows with a panel. `is_begun`: they are added to.
struct TiledSums {
  float* first;
  float* second;
};

// 32 rows with the panels a and b, over `n_steps` steps. `ahead`, unless it is null: as many bytes as the rows have are
// asked for from there on.
template <int kOf = kParts>
inline void multiply(const TiledRows& rows, const BFloat* a, const BFloat* b, std::ptrdiff_t n_steps, bool is_begun, const TiledSums& to_a,
                     const TiledSums& to_b, const char* ahead = nullptr) {
  constexpr int kLine = 64;
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles are loaded from memory, and moves stores behind it
  if (is_begun) {
    _tile_loadd(0, to_a.first, kLine);
    _tile_loadd(1, to_a.second, kLine);
    _tile_loadd(2, to_b.first, kLine);
    _tile_loadd(3, to_b.second, kLine);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const BFloat* upper = rows.first;
  const BFloat* lower = rows.first + kTile * rows.stride;
  const std::ptrdiff_t stride = rows.stride * static_cast<std::ptrdiff_t>(sizeof(BFloat));
  for (std::ptrdiff_t k = 0; k < n_steps; ++k) {
    if (ahead != nullptr) {
      for (int line = 0; line < kTiledRows; ++line, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
    }
    _tile_loadd(4, upper, stride);
    _tile_loadd(5, lower, stride);
    _tile_loadd(6, a, kLine);
    _tile_loadd(7, b, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    if constexpr (kOf == kParts) {
      _tile_loadd(6, a + kTileNumbers, kLine);
      _tile_loadd(7, b + kTileNumbers, kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    upper += kDeep;
    lower += kDeep;
    a += kOf * kTileNumbers;
    b += kOf * kTileNumbers;
  }
  _tile_stored(0, to_a.first, kLine);
  _tile_stored(1, to_a.second, kLine);
  _tile_stored(2, to_b.first, kLine);
  _tile_stored(3, to_b.second, kLine);
}

}  // namespace stratakv::STRATAKV_ISA
