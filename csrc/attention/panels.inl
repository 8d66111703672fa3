// The arithmetic over many queries and many rows: products of panels of queries with strips of rows or of values.
//
// A product is a sum of outer products: at each step kPanel numbers of one operand, each in all places of a register,
// meet a strip of the other, which is kVectors registers wide. All sums stay in registers.
#pragma once

#include <cstddef>

#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// As many queries as leave, of all registers, two for the strip and one or two for the numbers that meet it.
constexpr int kPanel = Vec::kRegisters >= 32 ? 12 : Vec::kRegisters >= 16 ? 6 : 2;
constexpr int kVectors = 2;
constexpr int kStrip = kVectors * Vec::kWidth;

// Rows of a tile, in whole strips; the scores of a query lie this far from the next one's.
constexpr int kPanelRows = 192;

inline std::ptrdiff_t whole_panels(std::ptrdiff_t m) { return (m + kPanel - 1) / kPanel * kPanel; }

template <int kWide, int kRows = kPanel>
struct Sums {
  Vec of[kRows][kWide];

  // of[i][.] += a[i * kAcross + k * kAlong] * b[k * kWide registers + .], over k.
  template <std::ptrdiff_t kAcross, std::ptrdiff_t kAlong>
  void add(const float* a, const float* b, int n) {
    for (int k = 0; k < n; ++k) {
      Vec strip[kWide];
      STRATAKV_UNROLL
      for (int j = 0; j < kWide; ++j) strip[j] = Vec::load(b + j * Vec::kWidth);
      STRATAKV_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const Vec number = Vec::all(a[i * kAcross]);
        STRATAKV_UNROLL
        for (int j = 0; j < kWide; ++j) of[i][j] = Vec::fma(number, strip[j], of[i][j]);
      }
      a += kAlong;
      b += kWide * Vec::kWidth;
    }
  }
};

// scores[i][r] = query i . key r, for the first kRows of one panel [dim, kPanel] and one strip [dim, kStrip] of keys.
template <int kRows = kPanel>
inline void score_panel(const float* panel, const float* strip, int dim, float* scores, std::ptrdiff_t stride) {
  Sums<kVectors, kRows> sums;
  STRATAKV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STRATAKV_UNROLL
    for (int j = 0; j < kVectors; ++j) sums.of[i][j] = Vec::zero();
  }
  sums.template add<1, kPanel>(panel, strip, dim);
  STRATAKV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STRATAKV_UNROLL
    for (int j = 0; j < kVectors; ++j) sums.of[i][j].store(scores + i * stride + j * Vec::kWidth);
  }
}

// values[i] = values[i] * decay[i] + sum over r of weights[i][r] * strip[r], for one panel and kWide registers of values.
template <int kWide>
inline void add_panel(const float* weights, const float* decay, const float* strip, int n, float* values, std::ptrdiff_t stride) {
  Sums<kWide> sums;
  STRATAKV_UNROLL
  for (int i = 0; i < kPanel; ++i) {
    STRATAKV_UNROLL
    for (int j = 0; j < kWide; ++j) sums.of[i][j] = Vec::load(values + i * stride + j * Vec::kWidth) * Vec::all(decay[i]);
  }
  sums.template add<kPanelRows, 1>(weights, strip, n);
  STRATAKV_UNROLL
  for (int i = 0; i < kPanel; ++i) {
    STRATAKV_UNROLL
    for (int j = 0; j < kWide; ++j) sums.of[i][j].store(values + i * stride + j * Vec::kWidth);
  }
}

// Keys as strips [strip, dim, kStrip]: the rows of a strip side by side. Behind the last row stand copies of it.
template <typename K>
inline void pack_keys(const K* const* rows, int n, int dim, float* to) {
  for (int row = 0; row < n; row += Vec::kWidth) {
    float* strip = to + std::ptrdiff_t{row / kStrip} * dim * kStrip + row % kStrip;
    const K* from[Vec::kWidth];
    for (int i = 0; i < Vec::kWidth; ++i) from[i] = rows[smaller(row + i, n - 1)];
    for (int d = 0; d < dim; d += Vec::kWidth) {
      const int n_dims = smaller(dim - d, Vec::kWidth);
      Vec x[Vec::kWidth];
      if (n_dims == Vec::kWidth) {
        STRATAKV_UNROLL
        for (int i = 0; i < Vec::kWidth; ++i) x[i] = Vec::load(from[i] + d);
        Vec::transpose(x);
        STRATAKV_UNROLL
        for (int i = 0; i < Vec::kWidth; ++i) x[i].store(strip + std::ptrdiff_t{d + i} * kStrip);
      } else {
        for (int i = 0; i < Vec::kWidth; ++i) x[i] = Vec::load_some(from[i] + d, n_dims);
        Vec::transpose(x);
        for (int i = 0; i < n_dims; ++i) x[i].store(strip + std::ptrdiff_t{d + i} * kStrip);
      }
    }
  }
}

// Registers of the strip of values that begins at column d of `stride`.
inline int width_at(std::ptrdiff_t d, std::ptrdiff_t stride) {
  return static_cast<int>(smaller<std::ptrdiff_t>(kStrip, stride - d) / Vec::kWidth);
}

// Values as strips of columns [strip, n, kStrip], of which the last may be narrower; zeros behind the last column.
template <typename V>
inline void pack_values(const V* const* rows, int n, int dim, float* to) {
  const std::ptrdiff_t stride = padded(dim);
  for (std::ptrdiff_t d = 0; d < stride; d += kStrip) {
    const int width = width_at(d, stride);
    if (d + kStrip <= dim) {
      for (int r = 0; r < n; ++r, to += kStrip) {
        STRATAKV_UNROLL
        for (int j = 0; j < kVectors; ++j) Vec::load(rows[r] + d + j * Vec::kWidth).store(to + j * Vec::kWidth);
      }
      continue;
    }
    for (int r = 0; r < n; ++r) {
      for (int j = 0; j < width; ++j, to += Vec::kWidth) {
        const std::ptrdiff_t first = d + j * Vec::kWidth;
        const int n_dims = static_cast<int>(between<std::ptrdiff_t>(dim - first, 0, Vec::kWidth));
        (n_dims == 0 ? Vec::zero() : Vec::load_some(rows[r] + first, n_dims)).store(to);
      }
    }
  }
}

}  // namespace stratakv::STRATAKV_ISA
