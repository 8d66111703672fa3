// Products of rows with a matrix of bf16 numbers by AMX: y = x W^T.
//
// W lies in tiles, in the order in which they are needed, so that it is read in one line: pairs of panels of 16 rows,
// and in a pair for every 32 columns a tile of either panel, as [two columns, row, 2] (Matrix::is_tiled). x lies in rows
// of bf16 numbers, rounded or in two parts. What comes out has inputs down and rows of W across, as y has.
#pragma once

#include <cstddef>

#include "amx/exponential.h"
#include "amx/tiles.h"
#include "isa/partial.h"
#include "isa/small.h"
#include "runner/arguments.h"
#include "runner/elementwise.inl"
#include "threads.h"

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

// What is asked for while a product is made: `lines` lines of 64 bytes a step.
struct Ahead {
  const char* from;
  int lines;
};

// Up to 32 inputs with a pair of panels of W.
template <int kOf, bool kTwo>
inline void multiply_pair(const BFloat* x, std::ptrdiff_t pitch, const BFloat* w, std::ptrdiff_t n_steps, Ahead ahead) {
  const std::ptrdiff_t stride = pitch * static_cast<std::ptrdiff_t>(sizeof(float));
  const BFloat* const lower = x + kTile * 2 * pitch;
  for (std::ptrdiff_t k = 0; k < n_steps; ++k, w += 2 * kTileNumbers) {
    for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T1);
    load_tile<6>(w);
    load_tile<7>(w + kTileNumbers);
    STRATAKV_UNROLL
    for (int part = 0; part < kOf; ++part) {
      const std::ptrdiff_t at = (k * kOf + part) * kDeep;
      load_tile<4>(x + at, stride);
      add_product<0, 4, 6>();
      add_product<1, 4, 7>();
      if constexpr (kTwo) {
        load_tile<5>(lower + at, stride);
        add_product<2, 5, 6>();
        add_product<3, 5, 7>();
      }
    }
  }
}

// Sums go to y [input, row of W], `pitch` numbers from input to input: written, or added to. The tiles 0 and 1 are those of
// the first 16 inputs with either panel of a pair, 2 and 3 those of the others.
struct TiledOutput {
  float* y;
  std::ptrdiff_t pitch, n_rows;
  bool adds;
};

template <int kNumber>
inline void begin_tile(const TiledOutput& out, float* y, bool is_whole) {
  if (out.adds && is_whole) {
    load_tile<kNumber>(y, out.pitch * static_cast<std::ptrdiff_t>(sizeof(float)));
  } else {
    zero_tile<kNumber>();
  }
}

// `n` inputs, `some` rows of W.
template <int kNumber>
inline void end_tile(const TiledOutput& out, float* y, int n, int some) {
  if (some >= kTile) {
    store_tile<kNumber>(y, out.pitch * static_cast<std::ptrdiff_t>(sizeof(float)));
    return;
  }
  alignas(64) float sums[kTileSums];
  store_tile<kNumber>(sums);
  for (int i = 0; i < n && some > 0; ++i) {
    const Vec sum = Vec::load(sums + i * kTile);
    float* const to = y + i * out.pitch;
    store_up_to(out.adds ? sum + load_up_to(to, some) : sum, to, some);
  }
}

template <int kOf>
inline void take(const TiledOutput& out, const BFloat* x, std::ptrdiff_t pitch, int input, int n, const BFloat* w, std::ptrdiff_t pair,
                 std::ptrdiff_t n_steps, Ahead ahead) {
  const std::ptrdiff_t row = pair * kTiledPair;
  const int left = static_cast<int>(smaller<std::ptrdiff_t>(out.n_rows - row, kTiledPair)), right = left - kTile, lower = n - kTile;
  float* const y = out.y + input * out.pitch + row;
  float* const below = y + kTile * out.pitch;
  begin_tile<0>(out, y, left >= kTile);
  begin_tile<1>(out, y + kTile, right >= kTile);
  if (lower > 0) {
    begin_tile<2>(out, below, left >= kTile);
    begin_tile<3>(out, below + kTile, right >= kTile);
    multiply_pair<kOf, true>(x, pitch, w, n_steps, ahead);
    end_tile<2>(out, below, lower, left);
    end_tile<3>(out, below + kTile, lower, right);
  } else {
    multiply_pair<kOf, false>(x, pitch, w, n_steps, ahead);
  }
  end_tile<0>(out, y, smaller(n, kTile), left);
  end_tile<1>(out, y + kTile, smaller(n, kTile), right);
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

template <int kOf, int kGates, int kUps>
inline void end_gated(const GatedOutput& out, int input, int n, std::ptrdiff_t pair) {
  alignas(64) float gates[kTileSums], ups[kTileSums];
  store_tile<kGates>(gates);
  store_tile<kUps>(ups);
  const int at = static_cast<int>(pair) * kTile, some = larger(out.n - at, 0);  // none where a pair is only half full
  const std::ptrdiff_t pitch = input_pitch(out.n);
  Vec gate_bias = Vec::zero(), up_bias = Vec::zero();
  if (out.bias != nullptr) {
    gate_bias = load_up_to(out.bias + at, some);
    up_bias = load_up_to(out.bias + out.n + at, some);
  }
  for (int i = 0; i < n; ++i) {
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

template <int kOf>
inline void take(const GatedOutput& out, const BFloat* x, std::ptrdiff_t pitch, int input, int n, const BFloat* w, std::ptrdiff_t pair,
                 std::ptrdiff_t n_steps, Ahead ahead) {
  zero_tile<0>();
  zero_tile<1>();
  if (n <= kTile) {
    multiply_pair<kOf, false>(x, pitch, w, n_steps, ahead);
    return end_gated<kOf, 0, 1>(out, input, n, pair);
  }
  zero_tile<2>();
  zero_tile<3>();
  multiply_pair<kOf, true>(x, pitch, w, n_steps, ahead);
  end_gated<kOf, 0, 1>(out, input, kTile, pair);
  end_gated<kOf, 2, 3>(out, input + kTile, n - kTile, pair);
}

// All inputs, settled, with a matrix. Each thread takes a stretch of W.
template <int kOf, typename Output>
inline void linear_tiled(const Matrix& matrix, const float* x, int n_inputs, int n_threads, const Output& out) {
  const std::ptrdiff_t pitch = input_pitch(matrix.n_columns), n_steps = whole_steps(matrix.n_columns);
  const std::ptrdiff_t n_pairs = (matrix.n_rows + kTiledPair - 1) / kTiledPair;
  in_parallel(n_threads, [&](int thread) {
    Tiles tiles;
    for (std::ptrdiff_t pair = n_pairs * thread / n_threads; pair < n_pairs * (thread + 1) / n_threads; ++pair) {
      const BFloat* const w = static_cast<const BFloat*>(matrix.data) + pair * n_steps * 2 * kTileNumbers;
      const int n_blocks = (n_inputs + kTiledPair - 1) / kTiledPair, lines = kLinesOfStep / n_blocks;
      Ahead ahead{reinterpret_cast<const char*>(w + n_steps * 2 * kTileNumbers), lines};
      for (int input = 0; input < n_inputs; input += kTiledPair, ahead.from += lines * n_steps * 64) {
        const int n = smaller(kTiledPair, n_inputs - input);
        tiles.have_rows(n);
        take<kOf>(out, reinterpret_cast<const BFloat*>(x + input * pitch), pitch, input, n, w, pair, n_steps, ahead);
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
