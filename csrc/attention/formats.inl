// The formats of pages, as types, and the two strands of a call.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/packed.inl"
#include "attention/packed_scores.inl"
#include "attention/packed_values.inl"
#include "attention/reading.inl"
#include "isa/partial.h"

namespace stratakv::STRATAKV_ISA {

// function(a value of the type that stands for the format of keys,
template <typename Function>
inline void with_keys(NumberType type, const Function& function) {
  switch (type) {
    case NumberType::kFloat: function(float{}); break;
    case NumberType::kBFloat: function(BFloat{}); break;
    case NumberType::kHalf: function(Half{}); break;
    case NumberType::kFloat8: function(Float8{}); break;
    case NumberType::kInt8: function(Int8{}); break;
    case NumberType::kInt4: function(Int4Keys{}); break;
    case NumberType::kInt2: function(Int2Keys{}); break;
  }
}

// or of values).
template <typename Function>
inline void with_values(NumberType type, const Function& function) {
  switch (type) {
    case NumberType::kFloat: function(float{}); break;
    case NumberType::kBFloat: function(BFloat{}); break;
    case NumberType::kHalf: function(Half{}); break;
    case NumberType::kFloat8: function(Float8{}); break;
    case NumberType::kInt8: function(Int8{}); break;
    case NumberType::kInt4: function(Int4{}); break;
    case NumberType::kInt2: function(Int2{}); break;
  }
}

// Rows of a page from `row` on, as kernels take them.
template <typename T>
inline const T* rows_in(const Pages&, const char* page, int dim, int row) {
  return reinterpret_cast<const T*>(page) + std::ptrdiff_t{row} * dim;
}
template <IsPacked F>
inline PackedRows<F> rows_in(const Pages& pages, const char* page, int dim, int row) {
  return PackedRows<F>::in(page, dim, pages.block_tokens, row);
}

template <typename T>
inline const void* place_of(const T* rows) {
  return rows;
}

// Rows may lie in two places: first those of `before`, then the call's own.
constexpr int kStrands = 2;

inline const AttentionArguments* strand(const AttentionArguments& a, int i) {
  return a.before == nullptr || i == 1 ? &a : a.before;
}

inline std::int64_t sequence_rows(const AttentionArguments& a, int sequence) {
  std::int64_t n = a.rows.counts[sequence] - a.rows.skips[sequence];
  if (a.before != nullptr) n += a.before->rows.counts[sequence] - a.before->rows.skips[sequence];
  return n;
}

// One row of a page as floats.
template <typename T>
inline void unpack(const T* row, int dim, float* to) {
  for (int d = 0; d < dim; d += Vec::kWidth) store_up_to(load_up_to(row + d, dim - d), to + d, dim - d);
}

template <IsPacked F>
inline void unpack(const PackedRows<F>& rows, int dim, float* to) {
  const int tile = rows.row / kLanes, lane = rows.row % kLanes, quads = PackedRows<F>::quads(dim);
  const auto parameter = [&](int which) {
    float wide[Vec::kWidth];
    rows.parameter(tile, which, lane / Vec::kWidth).store(wide);
    return wide[lane % Vec::kWidth];
  };
  const BFloat* const of_group = rows.parameters + std::ptrdiff_t{rows.row / kGroupRows} * 2 * dim;
  const unsigned char* const fours = reinterpret_cast<const unsigned char*>(rows.codes) + (std::ptrdiff_t{tile} * quads * kLanes + lane) * 4;
  float step = 0.0f, lowest = 0.0f;
  if constexpr (F::kCoding != Coding::kChannels) step = parameter(0);
  for (int d = 0; d < dim; ++d) {
    const int four = d / 4, bits = fours[std::ptrdiff_t{four / F::kFields} * kLanes * 4 + d % 4] >> (four % F::kFields * F::kBits) & ((1 << F::kBits) - 1);
    if constexpr (F::kCoding == Coding::kFloating) {
      const std::uint32_t shifted = (bits & 0x80u) << 24 | (bits & 0x7Fu) << 20;
      float x;
      std::memcpy(&x, &shifted, sizeof x);
      to[d] = x * 0x1p120f * step;
    } else {
      if constexpr (F::kCoding == Coding::kCentred) {
        lowest = -128.0f * step;
      } else if constexpr (F::kCoding == Coding::kAffine) {
        if (d % kGroup == 0) {
          step = parameter(d / kGroup);
          lowest = parameter(PackedRows<F>::groups(dim) + d / kGroup);
        }
      }
      to[d] = static_cast<float>(bits);
      if constexpr (F::kCoding != Coding::kChannels) to[d] = to[d] * step + lowest;
    }
  }
  if constexpr (F::kCoding == Coding::kChannels) {
    for (int d = 0; d < dim; d += Vec::kWidth) {
      const int n = dim - d;
      store_up_to(Vec::fma(load_up_to(to + d, n), load_up_to(of_group + d, n), load_up_to(of_group + dim + d, n)), to + d, n);
    }
  }
  if constexpr (F::kRotates) rotate(to, dim);
}

}  // namespace stratakv::STRATAKV_ISA
