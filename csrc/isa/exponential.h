// exp in every ISA, from the operations of Vec.
#pragma once

namespace stratakv::STRATAKV_ISA {

// e^x for x <= 0, to about 2 units in the last place; 0 below -87.3, where floats end. NaN gives NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite 1980); e^r by its series to the sixth power.
inline Vec exponential(Vec x) {
  const Vec lowest = Vec::all(-87.33654f);
  const Vec clipped = Vec::max(lowest, x);  // keeps NaN in its second operand
  const Vec n = Vec::round(clipped * Vec::all(1.44269504f));
  Vec r = Vec::fma(n, Vec::all(-0.693359375f), clipped);
  r = Vec::fma(n, Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.0f / 720);
  p = Vec::fma(p, r, Vec::all(1.0f / 120));
  p = Vec::fma(p, r, Vec::all(1.0f / 24));
  p = Vec::fma(p, r, Vec::all(1.0f / 6));
  p = Vec::fma(p, r, Vec::all(0.5f));
  p = Vec::fma(p, r, Vec::all(1.0f));
  p = Vec::fma(p, r, Vec::all(1.0f));
  return Vec::zero_where_less(x, lowest, p * Vec::power_of_two(n));
}

}  // namespace stratakv::STRATAKV_ISA
