// exp and tanh in every ISA, from the operations of Vec or, where it has better ones, its own.
#pragma once

#ifdef __AVX512F__
#include "isa/exponential_avx512.h"
#endif

namespace stratakv::STRATAKV_ISA {

constexpr float kLowestExponent = -87.33654f;  // e^x is no normal float below

// x = n ln 2 + r with |r| <= ln 2 / 2, for x >= kLowestExponent; ln 2 in two parts (Cody and Waite 1980).
struct Reduced {
  Vec n, r;

  static Reduced of(Vec x) {
    const Vec n = Vec::round(x * Vec::all(1.44269504f));
    return {n, Vec::fma(n, Vec::all(2.12194440e-4f), Vec::fma(n, Vec::all(-0.693359375f), x))};
  }
};

// e^x for x <= 0; 0 below -87.3, where floats end but for those with which processors are slow. NaN gives NaN.
inline Vec exponential(Vec x) {
#ifdef __AVX512F__
  const Vec power = x * Vec::all(kLog2E);  // to (2 + |x|) 1e-7
  return Vec::zero_where_less(power, Vec::all(-126.0f), exponential_2(power.v));
#else
  // To about 2 units in the last place; e^r by its series to the sixth power.
  const Vec lowest = Vec::all(kLowestExponent);
  const auto [n, r] = Reduced::of(Vec::max(lowest, x));  // keeps NaN in its second operand
  Vec p = Vec::all(1.0f / 720);
  p = Vec::fma(p, r, Vec::all(1.0f / 120));
  p = Vec::fma(p, r, Vec::all(1.0f / 24));
  p = Vec::fma(p, r, Vec::all(1.0f / 6));
  p = Vec::fma(p, r, Vec::all(0.5f));
  p = Vec::fma(p, r, Vec::all(1.0f));
  p = Vec::fma(p, r, Vec::all(1.0f));
  return Vec::zero_where_less(x, lowest, p * Vec::power_of_two(n));
#endif
}

// tanh x, to a few units in the last place also near 0. NaN gives NaN.
// With m = e^(-2|x|) - 1, which is 2^n (e^r - 1) + (2^n - 1) and loses nothing where n = 0, tanh |x| is -m / (2 + m).
inline Vec hyperbolic_tangent(Vec x) {
  const Vec zero = Vec::zero();
  const Vec size = Vec::max(zero - x, x);
  const auto [n, r] = Reduced::of(Vec::max(Vec::all(kLowestExponent), size * Vec::all(-2.0f)));
  Vec p = Vec::all(1.0f / 5040);
  p = Vec::fma(p, r, Vec::all(1.0f / 720));
  p = Vec::fma(p, r, Vec::all(1.0f / 120));
  p = Vec::fma(p, r, Vec::all(1.0f / 24));
  p = Vec::fma(p, r, Vec::all(1.0f / 6));
  p = Vec::fma(p, r, Vec::all(0.5f));
  p = Vec::fma(p, r * r, r);
  const Vec scale = Vec::power_of_two(n);
  const Vec m = Vec::fma(scale, p, scale - Vec::all(1.0f));
  const Vec minus = m / (Vec::all(2.0f) + m);  // tanh -|x|
  return Vec::zero_where_less(x, zero, zero - minus) + Vec::zero_where_less(zero, x, minus);
}

}  // namespace stratakv::STRATAKV_ISA
