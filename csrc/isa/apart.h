// bf16 numbers at even places and at odd ones, as two registers: with AVX-512 two cheap instructions, where one half after
// the other takes four.
#pragma once

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

// Whether that is faster.
template <typename T>
constexpr bool kApart = false;

#ifdef __AVX512F__
template <>
constexpr bool kApart<BFloat> = true;

inline void load_each(const BFloat* p, Vec (&x)[2]) {
  const __m512i bits = _mm512_loadu_si512(p);
  x[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  x[1].v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// Floats [2 kWidth] where they lie take the order `first`, then `second` = `first` + step.
inline void reorder(float* p, __m512i first, int step) {
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(step));
  const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + Vec::kWidth);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, first, b));
  _mm512_storeu_ps(p + Vec::kWidth, _mm512_permutex2var_ps(a, second, b));
}

// Even places before odd ones,
inline void part(float* p) {
  reorder(p, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), 1);
}

// and back.
inline void join(float* p) {
  reorder(p, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), 8);
}
#else
template <typename T>
void load_each(const T* p, Vec (&x)[2]);
void part(float* p);
void join(float* p);
#endif

template <typename T>
inline void load_each(const T* p, Vec (&x)[1]) {
  x[0] = Vec::load(p);
}

}  // namespace stratakv::STRATAKV_ISA
