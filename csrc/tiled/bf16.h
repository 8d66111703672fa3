// The same as by tile registers, by dot products of bf16 pairs in registers of AVX-512.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "isa/small.h"
#include "numbers.h"
#include "tiled/parts.h"

namespace stratakv::STRATAKV_ISA {

class Tiles {
 public:
  static constexpr bool kSplitsPay = false;
  static constexpr int kInputs = 24;  // twice as many as are in registers

  void have_rows(int n) { n_ = n; }

  template <int kRowParts, int kPanelParts>
  void multiply(Factors f, const TiledSums& sums, bool adds) {
    for (int row = 0; row < n_; row += kRowsAtOnce, f.ahead.lines = 0) {
      multiply_some<kRowsAtOnce, kRowParts, kPanelParts>(f, row, n_ - row, sums, adds);
    }
  }

 private:
  static constexpr int kRowsAtOnce = 12;  // with both panels 24 sums, of 32 registers
  static constexpr int kRowsInLine = 8;   // so few that memory is waited for

  // The first `n` rows from `row` on, at most kMost.
  template <int kMost, int kRowParts, int kPanelParts>
  void multiply_some(const Factors& f, int row, int n, const TiledSums& sums, bool adds) {
    if constexpr (kMost > 1) {
      if (n < kMost) return multiply_some<kMost - 1, kRowParts, kPanelParts>(f, row, n, sums, adds);
    }
    multiply_rows<kMost, kRowParts, kPanelParts>(f, row, sums, adds);
  }

  template <int kRows, int kRowParts, int kPanelParts>
  void multiply_rows(const Factors& f, int row, const TiledSums& sums, bool adds) {
    static_assert(kRowParts == 1 || kPanelParts == 1);
    __m512 of_a[kRows], of_b[kRows];
    float *const to_a = sums.a + row * sums.pitch, *const to_b = sums.b + row * sums.pitch;
    STRATAKV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      of_a[i] = adds ? _mm512_loadu_ps(to_a + i * sums.pitch) : _mm512_setzero_ps();
      of_b[i] = adds ? _mm512_loadu_ps(to_b + i * sums.pitch) : _mm512_setzero_ps();
    }
    const BFloat *x = f.rows + row * f.row_pitch, *a = f.a, *b = f.b;
    const char* ahead = f.ahead.from;
    for (std::ptrdiff_t k = 0; k < f.n_steps; ++k, x += kRowParts * kDeep, a += f.panel_pitch, b += f.panel_pitch) {
      for (int line = 0; line < f.ahead.lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      for (int part = 0; part < kRowParts * kPanelParts; ++part) {
        const BFloat* const of_rows = kRowParts > 1 ? x + part * kDeep : x;
        const std::ptrdiff_t of_panel = kPanelParts > 1 ? part * kTileNumbers : 0;
        if constexpr (kRows <= kRowsInLine) {
          add_panel(of_rows, f.row_pitch, a + of_panel, of_a);
          add_panel(of_rows, f.row_pitch, b + of_panel, of_b);
          continue;
        }
        for (int d = 0; d < kDeep; d += 2) {
          const __m512i from_a = _mm512_loadu_si512(a + of_panel + d * kTile), from_b = _mm512_loadu_si512(b + of_panel + d * kTile);
          STRATAKV_UNROLL
          for (int i = 0; i < kRows; ++i) {
            const __m512i pair = pair_at(of_rows + i * f.row_pitch + d);
            of_a[i] = dot(of_a[i], pair, from_a);
            of_b[i] = dot(of_b[i], pair, from_b);
          }
        }
      }
    }
    STRATAKV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      _mm512_storeu_ps(to_a + i * sums.pitch, of_a[i]);
      _mm512_storeu_ps(to_b + i * sums.pitch, of_b[i]);
    }
  }

  // One panel's share of a step, line after line: unrolled, its lines would be read in another order, which takes a
  // third to a half longer from memory.
  template <int kRows>
  static void add_panel(const BFloat* rows, std::ptrdiff_t pitch, const BFloat* panel, __m512 (&sums)[kRows]) {
#pragma GCC unroll 1
    for (int d = 0; d < kDeep; d += 2) {
      const __m512i columns = _mm512_loadu_si512(panel + d * kTile);
      STRATAKV_UNROLL
      for (int i = 0; i < kRows; ++i) sums[i] = dot(sums[i], pair_at(rows + i * pitch + d), columns);
    }
  }

  int n_ = kTiledPair;
};

}  // namespace stratakv::STRATAKV_ISA
