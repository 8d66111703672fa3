// Registers of 32 bf16 numbers, which products take in pairs.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

constexpr int kDeep = 32;

// sum[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1].
inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Two numbers, everywhere.
inline __m512i pair_at(const BFloat* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// The first `n` numbers, at most 32, and zeros.
inline __m512i some_numbers(const void* from, int n) {
  if (n >= kDeep) return _mm512_loadu_si512(from);
  return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, from);
}

}  // namespace stratakv::STRATAKV_ISA
