// Products of rows with a large matrix, whose bytes are read once: y = x W^T.
//
// One row of x: the rows of W one after the other, so that memory is read in one line. A few: rows of W are widened in
// that order, and meet all rows of x while they are near. Many: strips of W are widened and packed, and meet panels of
// x, as keys meet queries in prompts.
#pragma once

#include <cstddef>

#include "attention/panels.inl"
#include "attention/tiles.inl"
#include "isa/partial.h"
#include "isa/small.h"
#include "runner/linear_arguments.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// From so many rows of x on, packing pays.
constexpr int kPackedInputs = 12;

// Rows of W that a few rows of x meet at once.
constexpr int kWideRows = Vec::kRegisters >= 32 ? 6 : 3;

// How far ahead weights are asked for, in bytes, where it is not as far as pages are.
constexpr int kWeightsAhead = 1024;

// What is asked for while a row of weights is read.
template <typename W>
inline Wanted after_weights(const W* weights) {
  const char* const bytes = reinterpret_cast<const char*>(weights);
  return is_wide_amd() ? Wanted{bytes + pages_ahead(), bytes + pages_ahead() / 2} : Wanted{bytes + kWeightsAhead};
}

// One row of W with x, its sum still spread over a register. Of what is wanted as many bytes are asked for as the row has.
template <typename W>
inline Vec spread_product(const W* weights, const float* x, int n, Wanted wanted) {
  constexpr int kSums = 4;
  Vec sums[kSums];
  STRATAKV_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = Vec::zero();
  int d = 0;
  for (; d + kSums * Vec::kWidth <= n; d += kSums * Vec::kWidth) {
    fetch_page(wanted, d * std::ptrdiff_t{sizeof(W)}, kSums * Vec::kWidth * std::ptrdiff_t{sizeof(W)});
    STRATAKV_UNROLL
    for (int i = 0; i < kSums; ++i) {
      sums[i] = Vec::fma(Vec::load(x + d + i * Vec::kWidth), Vec::load(weights + d + i * Vec::kWidth), sums[i]);
    }
  }
  for (; d < n; d += Vec::kWidth) sums[0] = Vec::fma(load_up_to(x + d, n - d), load_up_to(weights + d, n - d), sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename W>
inline void one_product(const W* weights, std::ptrdiff_t n_rows, int n_columns, const float* x, float* y) {
  std::ptrdiff_t row = 0;
  for (; row + 4 <= n_rows; row += 4) {
    Vec sums[4];
    STRATAKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const W* const from = weights + (row + i) * n_columns;
      sums[i] = spread_product(from, x, n_columns, after_weights(from));
    }
    Vec::store_sums(sums[0], sums[1], sums[2], sums[3], y + row);
  }
  for (; row < n_rows; ++row) y[row] = spread_product(weights + row * n_columns, x, n_columns, {}).sum();
}

template <typename W>
inline void widen(const W* weights, std::ptrdiff_t n, float* to) {
  for (std::ptrdiff_t i = 0; i < n; i += Vec::kWidth) {
    const int some = static_cast<int>(smaller<std::ptrdiff_t>(n - i, Vec::kWidth));
    store_up_to(load_up_to(weights + i, some), to + i, some);
  }
}

// kWideRows rows, widened, with all rows of x; `next` is what is wanted after them.
template <typename W>
inline void tile_products(const float* wide, const LinearArguments& a, float* y, const char* next) {
  constexpr int kLines = (kWideRows * Vec::kWidth * static_cast<int>(sizeof(W)) + 63) / 64;
  const int n = a.n_columns();
  in_fours(a.n_inputs, [&](int m, auto count) {
    constexpr int kInputs = decltype(count)::value;
    const float* const x = a.x + std::ptrdiff_t{m} * n;
    float* const to = y + m * a.matrix.n_rows;
    if (m == 0) score_tile<float, kInputs, kWideRows, kLines>(wide, n, x, n, to, a.matrix.n_rows, next);
    else score_tile<float, kInputs, kWideRows>(wide, n, x, n, to, a.matrix.n_rows);
  });
}

template <typename W>
inline void linear_few(const LinearArguments& a) {
  const W* const weights = static_cast<const W*>(a.matrix.data);
  const std::ptrdiff_t n_rows = a.matrix.n_rows, n_columns = a.matrix.n_columns;
  in_parallel(a.n_threads, [&](int thread) {
    const std::ptrdiff_t eights = (n_rows + 7) / 8;  // no thread gets a part of eight rows
    const std::ptrdiff_t from = eights * thread / a.n_threads * 8;
    const std::ptrdiff_t to = smaller<std::ptrdiff_t>(eights * (thread + 1) / a.n_threads * 8, n_rows);
    if (a.n_inputs == 1) return one_product(weights + from * n_columns, to - from, a.n_columns(), a.x, a.y + from);
    float* const wide = a.scratch + thread * kWideRows * n_columns;
    for (std::ptrdiff_t row = from; row < to; row += kWideRows) {
      const int some = static_cast<int>(smaller<std::ptrdiff_t>(kWideRows, to - row));
      widen(weights + row * n_columns, some * n_columns, wide);
      if (some == kWideRows) {
        tile_products<W>(wide, a, a.y + row, reinterpret_cast<const char*>(weights + (row + kWideRows) * n_columns));
        continue;
      }
      for (int m = 0; m < a.n_inputs; ++m) {
        for (int r = 0; r < some; ++r) {
          a.y[m * n_rows + row + r] = spread_product(wide + r * n_columns, a.x + m * n_columns, a.n_columns(), {}).sum();
        }
      }
    }
  });
}

// Rows of x as panels [panel, n_columns, kPanel]; those that fill up the last one are zeros.
inline void pack_inputs(const LinearArguments& a, int panel, float* to) {
  const std::ptrdiff_t n_columns = a.matrix.n_columns;
  for (int i = 0; i < kPanel; ++i) {
    const int input = panel * kPanel + i;
    const float* from = a.x + input * n_columns;
    for (std::ptrdiff_t d = 0; d < n_columns; ++d) to[d * kPanel + i] = input < a.n_inputs ? from[d] : 0.0f;
  }
}

// The first `rows` of a panel, at most kMost.
template <int kMost>
inline void score_some(int rows, const float* panel, const float* strip, int n_columns, float* to, std::ptrdiff_t stride) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return score_some<kMost - 1>(rows, panel, strip, n_columns, to, stride);
  }
  score_panel<kMost>(panel, strip, n_columns, to, stride);
}

template <typename W>
inline void linear_many(const LinearArguments& a) {
  const W* const weights = static_cast<const W*>(a.matrix.data);
  const std::ptrdiff_t n_rows = a.matrix.n_rows, n_columns = a.matrix.n_columns;
  const int n_panels = static_cast<int>(whole_panels(a.n_inputs) / kPanel);
  float* const panels = a.scratch;
  float* const of_threads = panels + padded(whole_panels(a.n_inputs) * n_columns);
  in_parallel(a.n_threads, [&](int thread) {
    for (int p = n_panels * thread / a.n_threads; p < n_panels * (thread + 1) / a.n_threads; ++p) {
      pack_inputs(a, p, panels + p * kPanel * n_columns);
    }
  });
  in_parallel(a.n_threads, [&](int thread) {
    float* const strip = of_threads + thread * (kStrip * n_columns + kPanel * kStrip);
    float* const edge = strip + kStrip * n_columns;  // what a strip that is not whole gives
    const std::ptrdiff_t n_strips = (n_rows + kStrip - 1) / kStrip;
    for (std::ptrdiff_t s = n_strips * thread / a.n_threads; s < n_strips * (thread + 1) / a.n_threads; ++s) {
      const std::ptrdiff_t row = s * kStrip;
      const int some = static_cast<int>(smaller<std::ptrdiff_t>(kStrip, n_rows - row));
      const W* rows[kStrip];
      for (int r = 0; r < some; ++r) rows[r] = weights + (row + r) * n_columns;
      pack_keys(rows, some, a.n_columns(), strip);
      for (int p = 0; p < n_panels; ++p) {
        const int inputs = smaller(kPanel, a.n_inputs - p * kPanel);
        float* const y = a.y + p * kPanel * n_rows + row;
        const bool is_whole = some == kStrip;
        score_some<kPanel>(inputs, panels + p * kPanel * n_columns, strip, a.n_columns(), is_whole ? y : edge, is_whole ? n_rows : kStrip);
        for (int i = 0; !is_whole && i < inputs; ++i) copy(edge + i * kStrip, some, y + i * n_rows);
      }
    }
  });
}

inline void linear(const LinearArguments& a) {
  if (a.n_inputs == 0) return;
  const bool is_many = a.n_inputs >= kPackedInputs;
  switch (a.matrix.type) {
    case NumberType::kFloat: is_many ? linear_many<float>(a) : linear_few<float>(a); break;
    case NumberType::kBFloat: is_many ? linear_many<BFloat>(a) : linear_few<BFloat>(a); break;
    default: is_many ? linear_many<Half>(a) : linear_few<Half>(a); break;
  }
}

inline std::ptrdiff_t linear_floats(std::ptrdiff_t n_columns, int n_inputs, int n_threads) {
  const std::ptrdiff_t a_thread = larger<std::ptrdiff_t>(kStrip * n_columns + kPanel * kStrip, kWideRows * n_columns);
  return padded(whole_panels(n_inputs) * n_columns) + n_threads * a_thread;
}

}  // namespace stratakv::STRATAKV_ISA
