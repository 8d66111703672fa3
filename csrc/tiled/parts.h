// What products of bf16 tiles are made of: their sizes, and fp32 numbers as bf16 ones.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "isa/pairs.h"
#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

constexpr int kTile = 16;            // rows of a tile, and fp32 numbers of a row
constexpr int kTileNumbers = kTile * kDeep;  // bf16 numbers of a tile, of which a row has kDeep
constexpr int kTiledPair = 2 * kTile;  // two tiles side by side, or one below the other

inline std::ptrdiff_t whole_steps(std::ptrdiff_t n) { return (n + kDeep - 1) / kDeep; }

// What is asked for while a product is made: `lines` lines of 64 bytes a step.
struct Ahead {
  const char* from;
  int lines;
};

// What a product of up to 32 rows with the panels a and b, of 16 columns each, reads. Panels are tiles [pair of numbers,
// column, 2]. Parts of a step follow one another in either.
struct Factors {
  const BFloat* rows;
  std::ptrdiff_t row_pitch;  // numbers from a row to the next
  const BFloat *a, *b;
  std::ptrdiff_t panel_pitch;  // numbers from a step to the next
  std::ptrdiff_t n_steps;      // of 32 numbers
  Ahead ahead{nullptr, 0};
};

// What comes out: [row, column] with either panel, `pitch` numbers from a row to the next.
struct TiledSums {
  float *a, *b;
  std::ptrdiff_t pitch;
};

// An fp32 number as the sum of two bf16 numbers, which hold 16 of its 24 bits: what multiplies a bf16 number by both
// is nearly as good as fp32.
constexpr int kParts = 2;

struct Split {
  __m512i high, low;  // [32] bf16
};

inline __m512 widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// What is left of x, none where it is infinite or rounds to that.
inline __m512 remainder_of(__m512 x, __m256i high) {
  const __m512 rounded = widened(high);
  const __mmask16 is_finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rounded), _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
  return _mm512_maskz_sub_ps(is_finite, x, rounded);
}

inline Split split(__m512 first, __m512 second) {
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512 a = remainder_of(first, _mm512_castsi512_si256(high)), b = remainder_of(second, _mm512_extracti64x4_epi64(high, 1));
  return {high, (__m512i)_mm512_cvtne2ps_pbh(b, a)};
}

}  // namespace stratakv::STRATAKV_ISA
