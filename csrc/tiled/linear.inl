// Products of rows with a matrix of bf16 numbers in tiles: y = x W^T.
//
// W lies in tiles, in the order in which they are needed, so that it is read in one line: pairs of panels of 16 rows,
// and in a pair for every 32 columns a tile of either panel, as [two columns, row, 2] (Matrix::is_tiled). x lies in rows
// of bf16 numbers, rounded or in two parts. What comes out has inputs down and rows of W across, as y has.
#pragma once

#include <cstddef>

#include "isa/exponential_avx512.h"
#include "isa/partial.h"
#include "isa/small.h"
#include "runner/arguments.h"
#include "runner/elementwise.inl"
#include "threads.h"
#include "tiled/tiles.h"

namespace stratakv::STRATAKV_ISA {

// Numbers from one input to the next: as many fp32 numbers as fill whole steps, whose place the bf16 numbers take.
inline std::ptrdiff_t input_pitch(std::ptrdiff_t n_columns) { return whole_steps(n_columns) * kDeep; }

// An input of `n` fp32 numbers becomes [step, part, 32] bf16 numbers in its place, zeros behind the last.
template <int kOf>
inline void settle_input(float* x, int n) {
  BFloat* to = reinterpret_cast<BFloat*>(x);
  for (int d = 0; d < n; d += kDeep, to += kOf * kDeep) {
    const int some = n - d;
    const Vec first = load_up_to(x + d, some);
    const Vec second = some > Vec::kWidth ? load_up_to(x + d + Vec::kWidth, some - Vec::kWidth) : Vec::zero();
    const Split parts = split(first.v, second.v);
    _mm512_storeu_si512(to, parts.high);
    if constexpr (kOf == kParts) _mm512_storeu_si512(to + kDeep, parts.low);
  }
}

// Lines of 64 bytes that W has for a step of 32 columns.
constexpr int kLinesOfStep = 2 * kTileNumbers * static_cast<int>(sizeof(BFloat)) / 64;

// Inputs, at most Tiles::kInputs, `pitch` fp32 numbers apart, and a pair of panels of W with which they are multiplied.
struct TiledInputs {
  const float* x;
  int n;
  std::ptrdiff_t pitch;
  const BFloat* w;
  std::ptrdiff_t n_steps;
  Ahead ahead;
};

template <int kOf>
inline void multiply_pair(Tiles& tiles, const TiledInputs& f, const TiledSums& sums, bool adds) {
  tiles.multiply<kOf, 1>({reinterpret_cast<const BFloat*>(f.x), 2 * f.pitch, f.w, f.w + kTileNumbers, 2 * kTileNumbers, f.n_steps, f.ahead}, sums,
                         adds);
}

// Sums go to y [input, row of W], `pitch` numbers from input to input: written, or added to.
struct TiledOutput {
  float* y;
  std::ptrdiff_t pitch, n_rows;
  bool adds;
};

// Inputs from `input` on with a pair.
template <int kOf>
inline void take(Tiles& tiles, const TiledOutput& out, const TiledInputs& f, int input, std::ptrdiff_t pair) {
  const std::ptrdiff_t row = pair * kTiledPair;
  const int some = static_cast<int>(smaller<std::ptrdiff_t>(out.n_rows - row, kTiledPair));
  float* const y = out.y + input * out.pitch + row;
  if (some == kTiledPair) return multiply_pair<kOf>(tiles, f, {y, y + kTile, out.pitch}, out.adds);
  alignas(64) float sums[Tiles::kInputs * kTiledPair];
  multiply_pair<kOf>(tiles, f, {sums, sums + kTile, kTiledPair}, false);
  for (int i = 0; i < f.n; ++i) {
    for (int j = 0; j < some; ++j) y[i * out.pitch + j] = sums[i * kTiledPair + j] + (out.adds ? y[i * out.pitch + j] : 0.0f);
  }
}

// As `activated`, to 2^-21 or so of the result: what it becomes has 16 bits at most.
inline Vec tiled_activation(Activation activation, Vec x) {
  Vec u = x;
  if (activation == Activation::kGeluTanh) u = Vec::fma(x * x * x, Vec::all(0.044715f), x) * Vec::all(1.5957691216f);
  const Vec one = Vec::all(1.0f), a = one + exponential_2(_mm512_min_ps(_mm512_set1_ps(126.0f), (u * Vec::all(-kLog2E)).v));  // e^-u
  const Vec guess = {_mm512_rcp14_ps(a.v)};
  return x * (guess * (Vec::all(2.0f) - a * guess));
}

// Panels of a pair are the gates and the ups of 16 numbers, which become inputs of the next product, settled.
struct GatedOutput {
  float* next;
  int n;  // numbers of an input
  Activation activation;
  const float* bias;  // [2 n]: of the gates, then of the ups; or null
};

template <int kOf>
inline void take(Tiles& tiles, const GatedOutput& out, const TiledInputs& f, int input, std::ptrdiff_t pair) {
  alignas(64) float gates[Tiles::kInputs * kTile], ups[Tiles::kInputs * kTile];
  multiply_pair<kOf>(tiles, f, {gates, ups, kTile}, false);
  const int at = static_cast<int>(pair) * kTile, some = larger(out.n - at, 0);  // none where a pair is only half full
  const std::ptrdiff_t pitch = input_pitch(out.n);
  Vec gate_bias = Vec::zero(), up_bias = Vec::zero();
  if (out.bias != nullptr) {
    gate_bias = load_up_to(out.bias + at, some);
    up_bias = load_up_to(out.bias + out.n + at, some);
  }
  for (int i = 0; i < f.n; ++i) {
    const Vec gate = Vec::load(gates + i * kTile) + gate_bias, up = Vec::load(ups + i * kTile) + up_bias;
    const Vec y = tiled_activation(out.activation, gate) * up;  // behind the last number both are zero
    BFloat* const to = reinterpret_cast<BFloat*>(out.next + (input + i) * pitch) + at / kDeep * kOf * kDeep + at % kDeep;
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(y.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
    if constexpr (kOf == kParts) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kDeep), (__m256i)_mm512_cvtneps_pbh(remainder_of(y.v, high)));
    }
  }
}

// All inputs, settled, with a matrix. Each thread takes a stretch of W.
template <int kOf, typename Output>
inline void linear_tiled(const Matrix& matrix, const float* x, int n_inputs, int n_threads, const Output& out) {
  const std::ptrdiff_t pitch = input_pitch(matrix.n_columns), n_steps = whole_steps(matrix.n_columns), numbers = n_steps * 2 * kTileNumbers;
  const std::ptrdiff_t n_pairs = (matrix.n_rows + kTiledPair - 1) / kTiledPair;
  const int lines = kLinesOfStep / ((n_inputs + Tiles::kInputs - 1) / Tiles::kInputs);
  in_parallel(n_threads, [&](int thread) {
    Tiles tiles;
    for (std::ptrdiff_t pair = n_pairs * thread / n_threads; pair < n_pairs * (thread + 1) / n_threads; ++pair) {
      const BFloat* const w = static_cast<const BFloat*>(matrix.data) + pair * numbers;
      Ahead ahead{reinterpret_cast<const char*>(w + numbers), lines};
      for (int input = 0; input < n_inputs; input += Tiles::kInputs, ahead.from += lines * n_steps * 64) {
        const int n = smaller(Tiles::kInputs, n_inputs - input);
        tiles.have_rows(n);
        take<kOf>(tiles, out, {x + input * pitch, n, pitch, w, n_steps, ahead}, input, pair);
      }
    }
  });
}

// A row of a tiled matrix, widened and scaled.
inline void copy_tiled_row(const Matrix& matrix, std::ptrdiff_t row, float scale, float* to) {
  const std::ptrdiff_t n_steps = whole_steps(matrix.n_columns), in_pair = row % kTiledPair;
  const BFloat* const tiles = static_cast<const BFloat*>(matrix.data) + (row / kTiledPair * n_steps * 2 + in_pair / kTile) * kTileNumbers;
  for (std::ptrdiff_t d = 0; d < matrix.n_columns; ++d) {
    to[d] = scale * widened(tiles[d / kDeep * 2 * kTileNumbers + d % kDeep / 2 * kDeep + in_pair % kTile * 2 + d % 2]);
  }
}

}  // namespace stratakv::STRATAKV_ISA
