// Products of some rows with a large matrix of bf16 numbers by AMX: y = x W^T.
//
// Tiles of W are read as they lie. x is rounded to bf16, or split into two bf16 parts, and packed for all of W; what comes
// out has the rows of W down and the inputs across, and is turned on its way to y.
#pragma once

#include <cstddef>

#include "amx/product.inl"
#include "isa/partial.h"
#include "isa/small.h"
#include "runner/linear_arguments.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// Columns of W whose tiles stay in the first cache while all inputs meet them.
constexpr int kMostColumns = 640;

// Bytes of packed inputs that stay in the second cache while all of W goes by.
constexpr std::ptrdiff_t kPackedBytes = 1 << 20;

// How a product is cut, and what a thread's share of `scratch` holds.
struct TiledShape {
  std::ptrdiff_t n_steps, panel;  // of a panel of 16 inputs: steps, numbers
  int together;                   // inputs that are packed at a time
  std::ptrdiff_t packed, sums, rows;  // floats: of the packed inputs; of a thread's sums; of its copied rows

  static TiledShape of(std::ptrdiff_t n_columns, int n_inputs, int parts) {
    const std::ptrdiff_t panel = packed_numbers(n_columns, parts), panel_bytes = panel * static_cast<std::ptrdiff_t>(sizeof(BFloat));
    const int most = static_cast<int>(between<std::ptrdiff_t>(kPackedBytes / panel_bytes / 2, 1, 1 << 10)) * kTiledPair;
    const int together = smaller(most, n_inputs), n_pairs = (together + kTiledPair - 1) / kTiledPair;
    return {whole_steps(n_columns), panel, together, n_pairs * panel, std::ptrdiff_t{n_pairs} * 4 * kTileSums,
            whole_steps(n_columns) * kDeep * kTiledRows / 2};
  }

  std::ptrdiff_t floats(int n_threads) const { return packed + n_threads * (sums + rows); }
};

// A tile of sums to the places of `n_inputs` inputs and `n_rows` rows in y.
inline void turn(const float* sums, int n_inputs, int n_rows, float* y, std::ptrdiff_t stride) {
  Vec x[kTile];
  STRATAKV_UNROLL
  for (int i = 0; i < kTile; ++i) x[i] = Vec::load(sums + i * kTile);
  Vec::transpose(x);
  if (n_inputs >= kTile && n_rows >= kTile) {
    STRATAKV_UNROLL
    for (int i = 0; i < kTile; ++i) x[i].store(y + i * stride);
    return;
  }
  for (int i = 0; i < smaller(n_inputs, kTile); ++i) store_up_to(x[i], y + i * stride, n_rows);
}

// The strips of 32 rows of W that one thread takes, with the packed inputs [from, to).
template <int kOf>
class TiledStrips {
 public:
  TiledStrips(const LinearArguments& a, const TiledShape& shape, const BFloat* packed, int from, int to, float* memory)
      : a_(a),
        shape_(shape),
        packed_(packed),
        from_(from),
        to_(to),
        n_pairs_((to - from + kTiledPair - 1) / kTiledPair),
        sums_(memory),
        room_(reinterpret_cast<BFloat*>(memory + shape.sums)) {}

  void take(std::ptrdiff_t row) const {
    const int n_rows = static_cast<int>(smaller<std::ptrdiff_t>(kTiledRows, a_.matrix.n_rows - row));
    const std::ptrdiff_t n_pieces = (shape_.n_steps * kDeep + kMostColumns - 1) / kMostColumns;
    const TiledRows rows = rows_from(row, n_rows);
    for (std::ptrdiff_t piece = 0; piece < n_pieces; ++piece) {
      const std::ptrdiff_t step = shape_.n_steps * piece / n_pieces, n_steps = shape_.n_steps * (piece + 1) / n_pieces - step;
      for (int p = 0; p < n_pairs_; ++p) {
        const BFloat* const a = packed_ + 2 * p * shape_.panel + step * kOf * kTileNumbers;
        const bool fetches = p == 0 && n_rows == kTiledRows;
        const char* const next = reinterpret_cast<const char*>(weights(row + kTiledRows) + step * kDeep * kTiledRows);
        float* const sums = sums_ + std::ptrdiff_t{p} * 4 * kTileSums;
        multiply<kOf>(rows.from(step), a, a + shape_.panel, n_steps, piece > 0, {sums, sums + kTileSums},
                 {sums + 2 * kTileSums, sums + 3 * kTileSums}, fetches ? next : nullptr);
        if (piece + 1 == n_pieces) finish(p, row, n_rows);
      }
    }
  }

 private:
  const BFloat* weights(std::ptrdiff_t row) const { return static_cast<const BFloat*>(a_.matrix.data) + row * a_.matrix.n_columns; }

  // Tiles are read whole: rows that do not fill them are copied, with zeros behind.
  TiledRows rows_from(std::ptrdiff_t row, int n_rows) const {
    const std::ptrdiff_t n_columns = a_.matrix.n_columns, width = shape_.n_steps * kDeep;
    if (n_rows == kTiledRows && n_columns == width) return {weights(row), n_columns};
    for (int r = 0; r < kTiledRows; ++r) {
      for (std::ptrdiff_t d = 0; d < width; ++d) {
        room_[r * width + d] = r < n_rows && d < n_columns ? weights(row + r)[d] : BFloat{0};
      }
    }
    return {room_, width};
  }

  void finish(int pair, std::ptrdiff_t row, int n_rows) const {
    for (int t = 0; t < 4; ++t) {
      const int input = from_ + pair * kTiledPair + t / 2 * kTile, below = t % 2 * kTile;
      if (input >= to_ || below >= n_rows) continue;
      turn(sums_ + (std::ptrdiff_t{pair} * 4 + t) * kTileSums, to_ - input, n_rows - below,
           a_.y + input * a_.matrix.n_rows + row + below, a_.matrix.n_rows);
    }
  }

  const LinearArguments& a_;
  const TiledShape& shape_;
  const BFloat* packed_;
  int from_, to_, n_pairs_;
  float* sums_;
  BFloat* room_;
};

template <int kOf>
inline void linear_tiled(const LinearArguments& a) {
  const TiledShape shape = TiledShape::of(a.matrix.n_columns, a.n_inputs, kOf);
  BFloat* const packed = reinterpret_cast<BFloat*>(a.scratch);
  for (int from = 0; from < a.n_inputs; from += shape.together) {
    const int to = smaller(from + shape.together, a.n_inputs), n_panels = (to - from + kTiledPair - 1) / kTiledPair * 2;
    const int n_packers = to - from < kTiledPair ? 1 : a.n_threads;
    in_parallel(n_packers, [&](int thread) {
      for (int p = n_panels * thread / n_packers; p < n_panels * (thread + 1) / n_packers; ++p) {
        const int input = from + p * kTile;
        pack_panel<kOf>(a.x + input * a.matrix.n_columns, a.matrix.n_columns, between(to - input, 0, kTile), a.n_columns(), packed + p * shape.panel);
      }
    });
    in_parallel(a.n_threads, [&](int thread) {
      const Tiles tiles;
      const TiledStrips<kOf> strips(a, shape, packed, from, to, a.scratch + shape.packed + thread * (shape.sums + shape.rows));
      const std::ptrdiff_t n = (a.matrix.n_rows + kTiledRows - 1) / kTiledRows;
      for (std::ptrdiff_t s = n * thread / a.n_threads; s < n * (thread + 1) / a.n_threads; ++s) strips.take(s * kTiledRows);
    });
  }
}

// One input alone is multiplied in plain registers: rounded here, it gives what it would give among others.
inline void round_input(float* x, int n) {
  for (int d = 0; d < n; d += Vec::kWidth) {
    const __m256bh rounded = _mm512_cvtneps_pbh(load_up_to(x + d, n - d).v);
    store_up_to(Vec{widened((__m256i)rounded)}, x + d, n - d);
  }
}

}  // namespace stratakv::STRATAKV_ISA
