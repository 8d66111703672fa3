// Eight floats in an AVX2 register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec load(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  template <typename T>
  static Vec load_some(const T* p, int n) {  // the rest are zeros
    T padded[kWidth] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  template <typename T>
  void store_some(T* p, int n) const {
    T padded[kWidth];
    store(padded);
    std::memcpy(p, padded, n * sizeof(T));
  }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // The numbers without their signs.
  Vec size() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }

  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float largest() const {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }

  // The sums of four registers.
  static __m128 sums(Vec a, Vec b, Vec c, Vec d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  }
  static void store_sums(Vec a, Vec b, Vec c, Vec d, float* p) { _mm_storeu_ps(p, sums(a, b, c, d)); }

  // Rows become columns: kWidth of them.
  static void transpose(Vec* x) {
    __m256 quads[8];  // [0..3] and [4..7]: columns 0 to 3, and 4 to 7 in the upper half, of four rows
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      const __m256 a = _mm256_unpacklo_ps(x[i].v, x[i + 1].v), b = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
      const __m256 c = _mm256_unpacklo_ps(x[i + 2].v, x[i + 3].v), d = _mm256_unpackhi_ps(x[i + 2].v, x[i + 3].v);
      quads[i] = _mm256_shuffle_ps(a, c, 0x44);
      quads[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
      quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      quads[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      x[i + 4].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }

  // The numbers of these places.
  template <int... kPlaces>
  Vec shuffled() const {
    return {__builtin_shufflevector(v, v, kPlaces...)};
  }

  // Numbers as whole ones of 16 bits.
  __m128i words() const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  }
  // Whole numbers of at most 127,
  void store_bytes(std::int8_t* p) const { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words(), words())); }
  // or from 0 to 255.
  void store_counts(std::int8_t* p) const { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words(), words())); }

  // Of four registers those of at most 127 (with a sign), or those from 0 to 255.
  template <bool kHasSign>
  static void store_four(const Vec (&x)[4], std::int8_t* p) {
    const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1].v));
    const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(x[2].v), _mm256_cvtps_epi32(x[3].v));
    const __m256i bytes = kHasSign ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);  // whose fours come out in turns
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }

  static Vec zero_where_less(Vec a, Vec b, Vec value) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ), value.v)};
  }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // 2^n for whole n in [-126, 127].
  static Vec power_of_two(Vec n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
};

// Eight 32-bit integers, or 32 bytes.
struct Ints {
  __m256i v;

  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints all(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
  static Ints load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static Ints load_some(const void* p, int n) {
    std::int32_t words[Vec::kWidth] = {};
    std::memcpy(words, p, 4 * static_cast<std::size_t>(n));
    return load(words);
  }

  // Of each byte, kBits bits from kFrom on.
  template <int kFrom, int kBits>
  Ints field() const {
    if constexpr (kBits == 8) return *this;
    const __m256i moved = kFrom == 0 ? v : _mm256_srli_epi16(v, kFrom);
    return {_mm256_and_si256(moved, _mm256_set1_epi8((1 << kBits) - 1))};
  }

  // Of each number, n bits from `from` on.
  Ints bits(int from, int n) const {
    return {_mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(from)), _mm256_set1_epi32((1 << n) - 1))};
  }

  // sum[i] + the products of the four unsigned bytes of a[i] with the signed ones of b[i], of which no two together exceed 16 bits.
  static Ints dot(Ints sum, Ints a, Ints b) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1)))};
  }
  // 128 a + b.
  static Ints joined(Ints a, Ints b) { return {_mm256_add_epi32(_mm256_slli_epi32(a.v, 7), b.v)}; }
  Vec floats() const { return {_mm256_cvtepi32_ps(v)}; }

  // The numbers in e4m3 that stand in one byte of each four.
  template <int kByte>
  Vec e4m3() const {
    const __m256i x = _mm256_srli_epi32(v, 8 * kByte), size = _mm256_and_si256(x, _mm256_set1_epi32(0x7F));
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(size, 20), _mm256_set1_epi32(120 << 23));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-9f));  // without an exponent
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), size);
    const __m256 found = _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, _mm256_castsi256_ps(is_small));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(x, 24), _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    return {_mm256_or_ps(found, _mm256_castsi256_ps(sign))};
  }
};

}  // namespace stratakv::STRATAKV_ISA
