// Products of a few rows with a large matrix, whose bytes are read once: y = x W^T + bias.
#pragma once

#include <cstddef>

#include "attention/tiles.inl"
#include "isa/small.h"
#include "runner/arguments.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// Rows of W that are worked on for all rows of x before the next are read: they stay in the second cache meanwhile.
constexpr int kWeightRows = 48;

template <typename W, int kInputs>
inline void panel_product(const W* weights, int n_rows, int n_columns, const float* x, std::ptrdiff_t x_stride, float* y,
                          std::ptrdiff_t y_stride) {
  constexpr int kRows = kInputs == 1 ? 8 : larger(Vec::kRegisters / 4 / kInputs, 1) * 3;
  int r = 0;
  for (; r + kRows <= n_rows; r += kRows) {
    score_tile<W, kInputs, kRows>(weights + std::ptrdiff_t{r} * n_columns, n_columns, x, x_stride, y + r, y_stride);
  }
  for (; r < n_rows; ++r) {
    score_tile<W, kInputs, 1>(weights + std::ptrdiff_t{r} * n_columns, n_columns, x, x_stride, y + r, y_stride);
  }
}

template <typename W>
inline void product_of_rows(const Matrix& matrix, std::ptrdiff_t from, std::ptrdiff_t to, const float* x, std::ptrdiff_t x_stride,
                            int n_inputs, float* y, std::ptrdiff_t y_stride) {
  const int n_columns = static_cast<int>(matrix.n_columns);
  for (std::ptrdiff_t row = from; row < to; row += kWeightRows) {
    const int n_rows = static_cast<int>(smaller<std::ptrdiff_t>(kWeightRows, to - row));
    const W* weights = static_cast<const W*>(matrix.data) + row * n_columns;
    in_fours(n_inputs, [&](int m, auto count) {
      panel_product<W, decltype(count)::value>(weights, n_rows, n_columns, x + m * x_stride, x_stride, y + m * y_stride + row, y_stride);
    });
  }
}

// x: [n_inputs, n_columns], y: [n_inputs, n_rows]; the strides count numbers.
inline void linear(const Matrix& matrix, const float* x, std::ptrdiff_t x_stride, int n_inputs, float* y, std::ptrdiff_t y_stride,
                   int n_threads) {
  const std::ptrdiff_t n_panels = (matrix.n_rows + 7) / 8;  // no thread gets a part of eight rows
  in_parallel(n_threads, [&](int thread) {
    const std::ptrdiff_t from = n_panels * thread / n_threads * 8;
    const std::ptrdiff_t to = smaller<std::ptrdiff_t>(n_panels * (thread + 1) / n_threads * 8, matrix.n_rows);
    switch (matrix.type) {
      case NumberType::kFloat: product_of_rows<float>(matrix, from, to, x, x_stride, n_inputs, y, y_stride); break;
      case NumberType::kBFloat: product_of_rows<BFloat>(matrix, from, to, x, x_stride, n_inputs, y, y_stride); break;
      case NumberType::kHalf: product_of_rows<Half>(matrix, from, to, x, x_stride, n_inputs, y, y_stride); break;
    }
  });
}

}  // namespace stratakv::STRATAKV_ISA
