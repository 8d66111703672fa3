// New rows into pages.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/reading.inl"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// The largest finite number of a format.
template <typename T>
constexpr float kLargest = 3.40282347e38f;
template <>
constexpr float kLargest<BFloat> = 3.38953139e38f;
template <>
constexpr float kLargest<Half> = 65504.0f;

// Finite numbers beyond those of a format become its largest one; infinities and NaN stay.
template <typename T>
inline Vec saturated(Vec x) {
  const Vec zero = Vec::zero(), largest = Vec::all(kLargest<T>);
  const Vec at_most = zero - Vec::max(zero - largest, zero - x);  // max keeps NaN in its second operand
  const Vec infinite = Vec::zero_where_less(Vec::max(zero - x, x), Vec::all(__builtin_inff()), x);
  return Vec::max(zero - largest, at_most) + infinite;
}

template <typename T>
inline void store_row(const float* from, int dim, T* to) {
  for (int d = 0; d < dim; d += Vec::kWidth) store_up_to(saturated<T>(load_up_to(from + d, dim - d)), to + d, dim - d);
}

inline void store_row(const float* from, int dim, float* to) { copy(from, dim, to); }

inline void store_row(const float* from, int dim, NumberType type, char* page, int row) {
  const std::ptrdiff_t at = std::ptrdiff_t{row} * dim;
  switch (type) {
    case NumberType::kFloat: store_row(from, dim, reinterpret_cast<float*>(page) + at); break;
    case NumberType::kBFloat: store_row(from, dim, reinterpret_cast<BFloat*>(page) + at); break;
    default: store_row(from, dim, reinterpret_cast<Half*>(page) + at); break;  // others are not written here
  }
}

// The keys and values of one KV head become row `row` of a sequence.
inline void append_row(const Pages& pages, int sequence, int head, int row, const float* key, const float* value) {
  const int in_page = row % pages.block_tokens;
  char* block = block_bytes(pages, sequence, row / pages.block_tokens);
  store_row(key, pages.k_dim, pages.k_type, block + keys_at(pages, head), in_page);
  store_row(value, pages.v_dim, pages.v_type, block + values_at(pages, head), in_page);
}

}  // namespace stratakv::STRATAKV_ISA
