// Scores of queries against keys of few bits: a register has many rows side by side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/packed.inl"
#include "attention/tiles.inl"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Scores of kTiles tiles of rows: kQueries registers for each part of each tile.
template <IsFloating F, int kQueries, int kTiles>
inline void score_tiles(const PackedKeys<F>& rows, int tile, int part, const float* queries, std::ptrdiff_t stride,
                        Vec (&total)[kTiles][kQueries], Wanted wanted) {
  STRATAKV_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) total[t][m] = Vec::zero();
  }
  for (int quad = 0; quad < PackedKeys<F>::quads(rows.dim); ++quad) {
    Ints bytes[kTiles];
    STRATAKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      bytes[t] = rows.load(tile + t, quad, part);
      fetch_line<F>(wanted, (t * PackedKeys<F>::quads(rows.dim) + quad) * std::ptrdiff_t{4 * kLanes});
    }
    each_of_four([&](auto byte) {
      constexpr int kByte = decltype(byte)::value;
      STRATAKV_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const Vec keys = bytes[t].template e4m3<kByte>();
        STRATAKV_UNROLL
        for (int m = 0; m < kQueries; ++m) total[t][m] = Vec::fma(keys, Vec::all(queries[m * stride + 4 * quad + kByte]), total[t][m]);
      }
    });
  }
  STRATAKV_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    const Vec scale = rows.parameter(tile + t, 0, part);
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) total[t][m] = total[t][m] * scale;
  }
}

template <typename F, int kQueries, int kTiles>
inline void score_tiles(const PackedKeys<F>& rows, int tile, int part, const Digits (&digits)[kQueries], Vec (&total)[kTiles][kQueries],
                        Wanted wanted) {
  Ints sums[kTiles][kQueries][F::kDigits];
  STRATAKV_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      if (F::kDigits > 1) sums[t][m][0] = Ints::zero();
      sums[t][m][F::kDigits - 1] = Ints::all(digits[m].offset);
    }
  }
  for (int quad = 0; quad < PackedKeys<F>::quads(rows.dim); ++quad) {
    Ints bytes[kTiles];
    STRATAKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      bytes[t] = rows.load(tile + t, quad, part);
      fetch_line<F>(wanted, (t * PackedKeys<F>::quads(rows.dim) + quad) * std::ptrdiff_t{4 * kLanes});
    }
    each_field<F>([&](auto field) {
      constexpr int kField = decltype(field)::value;
      Ints codes[kTiles];
      STRATAKV_UNROLL
      for (int t = 0; t < kTiles; ++t) codes[t] = bytes[t].template field<kField * F::kBits, F::kBits>();
      STRATAKV_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        STRATAKV_UNROLL
        for (int i = 0; i < F::kDigits; ++i) {
          const Ints four = Ints::all(digits[m].of[i][quad * F::kFields + kField]);
          STRATAKV_UNROLL
          for (int t = 0; t < kTiles; ++t) sums[t][m][i] = Ints::dot(sums[t][m][i], codes[t], four);
        }
      }
    });
  }
  STRATAKV_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    STRATAKV_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      Vec scale = Vec::all(digits[m].scale);
      if constexpr (F::kCoding == Coding::kCentred) scale = scale * rows.parameter(tile + t, 0, part);
      total[t][m] = Vec::fma(joined(sums[t][m]).floats(), scale, Vec::all(digits[m].base));
    }
  }
}

// Scores of `n` rows, of which the first tile and the last may have others, too.
template <typename F, int kQueries>
inline void score_rows(const PackedKeys<F>& rows, int n, int dim, const float* queries, std::ptrdiff_t stride, float* scores,
                       Wanted wanted) {
  constexpr int kTiles = Vec::kRegisters >= 32 ? 4 / F::kDigits : 1;  // as many as leave all sums in registers
  const int from = rows.row, to = rows.row + n;
  const std::ptrdiff_t tile_bytes = PackedKeys<F>::tile_bytes(dim);
  const auto put = [&](int tile, int part, const Vec(&total)[kQueries]) {
    const int row = tile * kLanes + part * Vec::kWidth;
    for (int m = 0; m < kQueries; ++m) {
      float* const to_scores = scores + m * std::ptrdiff_t{kTileRows} + (row - from);
      if (from <= row && row + Vec::kWidth <= to) {
        total[m].store(to_scores);
      } else {
        float some[Vec::kWidth];
        total[m].store(some);
        for (int i = larger(from - row, 0); i < smaller(to - row, Vec::kWidth); ++i) to_scores[i] = some[i];
      }
    }
  };
  Digits digits[kQueries];
  int tile = from / kLanes, end = 0;
  const auto advance = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; tile + kCount <= end; tile += kCount) {
      const Wanted of_tile = wanted.on((tile - from / kLanes) * tile_bytes);
      for (int part = 0; part < kPieces; ++part) {
        Vec total[kCount][kQueries];
        const Wanted lines = part == 0 ? of_tile : Wanted{};
        if constexpr (IsFloating<F>) score_tiles<F, kQueries, kCount>(rows, tile, part, queries, stride, total, lines);
        else score_tiles<F, kQueries, kCount>(rows, tile, part, digits, total, lines);
        for (int t = 0; t < kCount; ++t) put(tile + t, part, total[t]);
      }
    }
  };
  const auto advance_to = [&](int last) {
    end = last;
    advance(Count<kTiles>{});
    if constexpr (kTiles > 1) advance(Count<1>{});
  };
  const int last = (to + kLanes - 1) / kLanes;
  if constexpr (F::kCoding == Coding::kChannels) {
    alignas(64) std::int8_t memory[kQueries][F::kDigits * kMostDim];
    const std::ptrdiff_t group_bytes = std::ptrdiff_t{2 * static_cast<int>(sizeof(BFloat))} * dim;
    for (int group = from / kGroupRows; group * kGroupRows < to; ++group) {
      const char* const own = reinterpret_cast<const char*>(rows.parameters) + group * group_bytes;
      if (wanted.far != nullptr) fetch_page(wanted.far + (own - rows.codes) - from / kLanes * tile_bytes, group_bytes);
      digits_for<F, kQueries>(queries, stride, dim, rows.parameters + std::ptrdiff_t{group} * 2 * dim, memory[0], digits);
      advance_to(smaller(last, (group + 1) * kGroupRows / kLanes));
    }
  } else {
    if constexpr (!IsFloating<F>) {
      for (int m = 0; m < kQueries; ++m) digits[m] = digits_of(queries + m * stride, dim);
    }
    advance_to(last);
  }
}

}  // namespace stratakv::STRATAKV_ISA
