// Vectors, and rows of weights, as panels of 16 columns, with which rows are multiplied as they lie.
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

// The upper halves of two rows' numbers side by side: what bf16 has of them, cut off.
inline __m512i upper_halves(__m512i first, __m512i second) { return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(first, 16), second); }

inline __m512i rounded_pair(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  return upper_halves(_mm512_add_epi32(_mm512_castps_si512(first), half), _mm512_add_epi32(_mm512_castps_si512(second), half));
}

// Numbers of two rows side by side: rounded, or once what bf16 has of them (cut off) and once what is left (rounded).
template <int kOf>
inline void store_pair(__m512 first, __m512 second, BFloat* to) {
  if constexpr (kOf == 1) {
    _mm512_storeu_si512(to, rounded_pair(first, second));
    return;
  }
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const auto left = [&](__m512 x, __m512i bits) { return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(bits, upper))); };
  _mm512_storeu_si512(to, upper_halves(a, b));
  _mm512_storeu_si512(to + kTileNumbers, rounded_pair(left(first, a), left(second, b)));
}

}  // namespace stratakv::STRATAKV_ISA
