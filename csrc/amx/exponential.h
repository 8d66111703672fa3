// 2^x with what AVX-512 has for it.
#pragma once

#include <immintrin.h>

namespace stratakv::STRATAKV_ISA {

constexpr float kLog2E = 1.44269504f;

// 0 for -inf, NaN for NaN. The polynomial is the minimax of 2^x for x in [0, 1): to 8e-8, or to 8e-5, which is a 26th of
// what rounding to bf16 leaves.
template <bool kIsRounded = false>
inline Vec exponential_2(__m512 power) {
  constexpr int kToWholeBelow = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec part = {_mm512_reduce_ps(power, kToWholeBelow)};
  Vec p;
  if constexpr (kIsRounded) {
    p = Vec::fma(Vec::all(7.8024521e-2f), part, Vec::all(2.2606716e-1f));
    p = Vec::fma(p, part, Vec::all(6.9583356e-1f));
    p = Vec::fma(p, part, Vec::all(9.9992520e-1f));
  } else {
    p = Vec::fma(Vec::all(1.8775767e-3f), part, Vec::all(8.9893397e-3f));
    p = Vec::fma(p, part, Vec::all(5.5826318e-2f));
    p = Vec::fma(p, part, Vec::all(2.4015361e-1f));
    p = Vec::fma(p, part, Vec::all(6.9315308e-1f));
    p = Vec::fma(p, part, Vec::all(9.9999994e-1f));
  }
  return {_mm512_scalef_ps(p.v, power)};
}

}  // namespace stratakv::STRATAKV_ISA
