// Rotation of a row by Hadamard matrices of the largest power of two that divides its length; its own inverse.
//
// Sums and differences come in the order that the codecs' Python code has them in.
#pragma once

#include <cmath>
#include <cstddef>

#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

inline void rotate(float* row, int dim) {
  const int size = dim & -dim;
  int step = 1;
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
