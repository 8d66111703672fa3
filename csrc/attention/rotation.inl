// Rotation of a row by Hadamard matrices of the largest power of two that divides its length; its own inverse.
//
// Sums and differences come in the order that the codecs' Python code has them in.
#pragma once

#include <cmath>
#include <cstddef>
#include <utility>

#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Of each number and the one kStep places behind it, the sum and the difference: a + b and a - b, of one register.
template <int kStep, int... kPlaces>
inline Vec sums_and_differences(Vec x, std::integer_sequence<int, kPlaces...>) {
  const float signs[] = {(kPlaces & kStep ? -1.0f : 1.0f)...};
  return Vec::fma(x, Vec::load(signs), x.shuffled<(kPlaces ^ kStep)...>());
}

template <int kStep = 1>
inline Vec rotate_within(Vec x) {
  if constexpr (kStep == Vec::kWidth) return x;
  else return rotate_within<2 * kStep>(sums_and_differences<kStep>(x, std::make_integer_sequence<int, Vec::kWidth>()));
}

inline void rotate(float* row, int dim) {
  const int size = dim & -dim;
  int step = 1;
  if (size >= Vec::kWidth) {
    for (int i = 0; i < dim; i += Vec::kWidth) rotate_within(Vec::load(row + i)).store(row + i);
    step = Vec::kWidth;
  }
  for (; step < size && step < Vec::kWidth; step *= 2) {
    for (int at = 0; at < dim; at += 2 * step) {
      for (int i = at; i < at + step; ++i) {
        const float a = row[i], b = row[i + step];
        row[i] = a + b;
        row[i + step] = a - b;
      }
    }
  }
  for (; step < size; step *= 2) {
    for (int at = 0; at < dim; at += 2 * step) {
      for (int i = at; i < at + step; i += Vec::kWidth) {
        const Vec a = Vec::load(row + i), b = Vec::load(row + i + step);
        (a + b).store(row + i);
        (a - b).store(row + i + step);
      }
    }
  }
  const float share = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int i = 0; i < dim; ++i) row[i] *= share;
}

}  // namespace stratakv::STRATAKV_ISA
