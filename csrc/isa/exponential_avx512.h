// 2^x with what AVX-512 has for it.
#pragma once

#include <immintrin.h>

namespace stratakv::STRATAKV_ISA {

constexpr float kLog2E = 1.44269504f;

// 0 for -inf, NaN for NaN. The polynomial for x in [0, 1) is the best for 2^x of those that are 1 at 0, as the largest weight
// of a softmax is: to 1e-7; or the best of those that are exact at both ends, to 1.1e-4, which is an 18th of what rounding to
// bf16 leaves.
template <bool kIsRounded = false>
inline Vec exponential_2(__m512 power) {
  constexpr int kToWholeBelow = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec part = {_mm512_reduce_ps(power, kToWholeBelow)};
  Vec p;
  if constexpr (kIsRounded) {
    p = Vec::fma(Vec::all(7.826797e-2f), part, Vec::all(2.2630768e-1f));
    p = Vec::fma(p, part, Vec::all(6.9542435e-1f));
    p = Vec::fma(p, part, Vec::all(1.0f));
  } else {
    p = Vec::fma(Vec::all(1.8671305e-3f), part, Vec::all(9.0170298e-3f));
    p = Vec::fma(p, part, Vec::all(5.5799913e-2f));
    p = Vec::fma(p, part, Vec::all(2.4016444e-1f));
    p = Vec::fma(p, part, Vec::all(6.9315130e-1f));
    p = Vec::fma(p, part, Vec::all(1.0f));
  }
  return {_mm512_scalef_ps(p.v, power)};
}

}  // namespace stratakv::STRATAKV_ISA
