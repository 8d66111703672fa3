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
inline auto key_rows_in(const Pages& pages, const char* page, int row) {
  if constexpr (IsPacked<T>) return PackedKeys<T>(page, pages.k_dim, pages.block_tokens, row);
  else return reinterpret_cast<const T*>(page) + std::ptrdiff_t{row} * pages.k_dim;
}
template <typename T>
inline auto value_rows_in(const Pages& pages, const char* page, int row) {
  if constexpr (IsPacked<T>) return PackedValues<T>(page, pages.v_dim, pages.block_tokens, row);
  else return reinterpret_cast<const T*>(page) + std::ptrdiff_t{row} * pages.v_dim;
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

}  // namespace stratakv::STRATAKV_ISA
