// Sixteen floats in an AVX-512 register (F, BW, VL, DQ), and what VNNI adds.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load(const BFloat* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load_some(const Half* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
  static Vec load_some(const BFloat* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(BFloat* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat()); }
  void store_some(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_some(Half* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), half()); }
  void store_some(BFloat* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), bfloat()); }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // The numbers without their signs.
  Vec size() const { return {_mm512_abs_ps(v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
  static void store_sums(Vec a, Vec b, Vec c, Vec d, float* p) {
    const __m512d ab = _mm512_castps_pd(in_pairs(a.v, b.v)), cd = _mm512_castps_pd(in_pairs(c.v, d.v));
    const __m512 fours = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 twos = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(fours), 1)));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
  }

  // Rows become columns: kWidth of them. Row i and row i + 8 are interleaved to rows 2 i and 2 i + 1, which rotates the
  // bits of (row, column) by one; four such rounds swap row and column.
  static void transpose(Vec* x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
      Vec y[kWidth];
#pragma GCC unroll 8
      for (int i = 0; i < kWidth / 2; ++i) {
        y[2 * i].v = _mm512_permutex2var_ps(x[i].v, low, x[i + kWidth / 2].v);
        y[2 * i + 1].v = _mm512_permutex2var_ps(x[i].v, high, x[i + kWidth / 2].v);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) x[i] = y[i];
    }
  }

  // The numbers of these places.
  template <int... kPlaces>
  Vec shuffled() const {
    return {__builtin_shufflevector(v, v, kPlaces...)};
  }

  // Whole numbers of at most 127.
  void store_bytes(std::int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  // Whole numbers from 0 to 255.
  void store_counts(std::int8_t* p) const { store_bytes(p); }

  // Of four registers those of at most 127 (with a sign), or those from 0 to 255.
  template <bool kHasSign>
  static void store_four(const Vec (&x)[4], std::int8_t* p) {
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    _mm512_storeu_si512(p, in_order(kHasSign ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd)));
  }
  // Bytes that were packed twice: fours of them come out in turns.
  static __m512i in_order(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
  }

  static Vec zero_where_less(Vec a, Vec b, Vec value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), value.v)};
  }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // 2^n for whole n in [-126, 127].
  static Vec power_of_two(Vec n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }

 private:
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m256i bfloat() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC0)));
  }
  // Sums of numbers of a, then of b, in turns.
  static __m512 in_pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
};

// Sixteen 32-bit integers, or 64 bytes.
struct Ints {
  __m512i v;

  static Ints zero() { return {_mm512_setzero_si512()}; }
  static Ints all(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Ints load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static Ints load_some(const void* p, int n) { return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p)}; }

  // Of each byte, kBits bits from kFrom on.
  template <int kFrom, int kBits>
  Ints field() const {
    if constexpr (kBits == 8) return *this;
    const __m512i moved = kFrom == 0 ? v : _mm512_srli_epi16(v, kFrom);
    return {_mm512_and_si512(moved, _mm512_set1_epi8((1 << kBits) - 1))};
  }

  // Of each number, n bits from `from` on.
  Ints bits(int from, int n) const {
    return {_mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(from)), _mm512_set1_epi32((1 << n) - 1))};
  }

  // sum[i] + the products of the four unsigned bytes of a[i] with the signed ones of b[i], of which no two together exceed 16 bits.
  static Ints dot(Ints sum, Ints a, Ints b) {
#ifdef __AVX512VNNI__
    return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_maddubs_epi16(a.v, b.v), _mm512_set1_epi16(1)))};
#endif
  }
  // 128 a + b.
  static Ints joined(Ints a, Ints b) { return {_mm512_add_epi32(_mm512_slli_epi32(a.v, 7), b.v)}; }
  Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }

  // The numbers in e4m3 that stand in one byte of each four.
  template <int kByte>
  Vec e4m3() const {
    const __m512i x = _mm512_srli_epi32(v, 8 * kByte), size = _mm512_and_si512(x, _mm512_set1_epi32(0x7F));
    const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23));
    const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0x1p-9f));  // without an exponent
    const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8));
    const __m512 found = _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_small, small);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi32(x, 24), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
    return {_mm512_or_ps(found, _mm512_castsi512_ps(sign))};
  }
};

// 64 numbers times `factor` as whole numbers of two digits; returns the sum of those that stand 16 apart.
inline Vec store_digits(const float* x, Vec factor, std::int8_t* high, std::int8_t* low) {
  __m512i whole[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), factor.v));
  const __m512i sums = _mm512_add_epi32(_mm512_add_epi32(whole[0], whole[1]), _mm512_add_epi32(whole[2], whole[3]));
  const __m512i a = _mm512_packs_epi32(whole[0], whole[1]), b = _mm512_packs_epi32(whole[2], whole[3]), half = _mm512_set1_epi16(64);
  const __m512i a_high = _mm512_srai_epi16(_mm512_add_epi16(a, half), 7), b_high = _mm512_srai_epi16(_mm512_add_epi16(b, half), 7);
  const __m512i a_low = _mm512_sub_epi16(a, _mm512_slli_epi16(a_high, 7)), b_low = _mm512_sub_epi16(b, _mm512_slli_epi16(b_high, 7));
  _mm512_storeu_si512(high, Vec::in_order(_mm512_packs_epi16(a_high, b_high)));
  _mm512_storeu_si512(low, Vec::in_order(_mm512_packs_epi16(a_low, b_low)));
  return {_mm512_cvtepi32_ps(sums)};
}

}  // namespace stratakv::STRATAKV_ISA
