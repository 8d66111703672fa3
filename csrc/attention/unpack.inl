// Rows of few bits as floats, for prompts: once for all queries of a tile. What was rotated stays so.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/packed.inl"
#include "attention/rotation.inl"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// Queries meet rotated keys rotated, and what rotated values add up to is rotated back.
template <typename F>
inline void turn([[maybe_unused]] float* row, [[maybe_unused]] int dim) {
  if constexpr (IsPacked<F>) {
    if constexpr (F::kRotates) rotate(row, dim);
  }
}

// The codes, as numbers, that stand in one byte of each word.
template <IsPacked F>
inline Vec numbers_in(Ints words, int byte, int field) {
  if constexpr (IsFloating<F>) return words.bits(8 * byte, 8).template e4m3<0>();
  else return words.bits(8 * byte + field * F::kBits, F::kBits).floats();
}

// `n` rows from the first one on, `stride` floats apart; what lies behind their last column may be written over.
template <typename T>
inline void unpack(const T* rows, int n, int dim, float* to, std::ptrdiff_t stride) {
  for (int r = 0; r < n; ++r) {
    for (int d = 0; d < dim; d += Vec::kWidth) load_up_to(rows + std::ptrdiff_t{r} * dim + d, dim - d).store(to + r * stride + d);
  }
}

template <IsPacked F>
inline void unpack(const PackedKeys<F>& rows, int n, int dim, float* to, std::ptrdiff_t stride) {
  const int end = rows.row + n;
  for (int first = rows.row / Vec::kWidth * Vec::kWidth; first < end; first += Vec::kWidth) {
    const int tile = first / kLanes, part = first % kLanes / Vec::kWidth;
    const BFloat* const of_channels = rows.parameters + std::ptrdiff_t{first / kGroupRows} * 2 * dim;
    for (int d = 0; d < dim; d += Vec::kWidth) {
      Vec x[Vec::kWidth];
      for (int i = 0; i < Vec::kWidth; ++i) {
        const int channel = smaller(d + i, dim - 1), four = channel / 4;
        x[i] = numbers_in<F>(rows.load(tile, four / F::kFields, part), channel % 4, four % F::kFields);
        if constexpr (F::kCoding == Coding::kChannels) {
          x[i] = Vec::fma(x[i], Vec::all(widened(of_channels[channel])), Vec::all(widened(of_channels[dim + channel])));
        } else {
          if constexpr (F::kCoding == Coding::kCentred) x[i] = x[i] - Vec::all(128.0f);
          x[i] = x[i] * rows.parameter(tile, 0, part);
        }
      }
      Vec::transpose(x);
      for (int r = larger(first, rows.row); r < smaller(first + Vec::kWidth, end); ++r) x[r - first].store(to + (r - rows.row) * stride + d);
    }
  }
}

template <IsPacked F>
inline void unpack(const PackedValues<F>& rows, int n, int dim, float* to, std::ptrdiff_t stride) {
  const int end = rows.row + n, n_words = PackedValues<F>::words(dim);
  for (int first = rows.row / 4 * 4; first < end; first += 4) {
    const char* const four = rows.codes + std::ptrdiff_t{first / 4} * n_words * 4;
    for (int g = 0; g * kGroup < dim; ++g) {
      const int own = PackedValues<F>::words_of(dim, g);
      for (int word = 0; word < own; word += Vec::kWidth) {
        const char* const from = four + (PackedValues<F>::word_at(g) + std::ptrdiff_t{word}) * 4;
        const Ints words = own - word >= Vec::kWidth ? Ints::load(from) : Ints::load_some(from, own - word);
        for (int r = larger(first, rows.row); r < smaller(first + 4, end); ++r) {
          const BFloat* const parameters = rows.parameters + std::ptrdiff_t{r / kLanes} * PackedValues<F>::n_parameters(dim) * kLanes + r % kLanes;
          const int which = F::kAffine ? g : 0;
          const Vec step = Vec::all(widened(parameters[which * kLanes]));
          for (int field = 0; field < F::kFields; ++field) {
            const int d = g * kGroup + field * own + word, n_left = smaller(own - word, dim - d);
            if (n_left <= 0) continue;
            Vec x = numbers_in<F>(words, r - first, field);
            if constexpr (F::kAffine) {
              x = Vec::fma(x, step, Vec::all(widened(parameters[(PackedValues<F>::groups(dim) + which) * kLanes])));
            } else {
              x = (F::kCoding == Coding::kCentred ? x - Vec::all(128.0f) : x) * step;
            }
            store_up_to(x, to + (r - rows.row) * stride + d, n_left);
          }
        }
      }
    }
  }
}

}  // namespace stratakv::STRATAKV_ISA
