// New rows into pages.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "attention/reading.inl"
#include "isa/partial.h"

namespace stratakv::STRATAKV_ISA {

template <typename T>
inline void store_row(const float* from, int dim, T* to) {
  for (int d = 0; d < dim; d += Vec::kWidth) store_up_to(load_up_to(from + d, dim - d), to + d, dim - d);
}

inline void store_row(const float* from, int dim, NumberType type, char* page, int row) {
  const std::ptrdiff_t at = std::ptrdiff_t{row} * dim;
  switch (type) {
    case NumberType::kFloat: store_row(from, dim, reinterpret_cast<float*>(page) + at); break;
    case NumberType::kBFloat: store_row(from, dim, reinterpret_cast<BFloat*>(page) + at); break;
    case NumberType::kHalf: store_row(from, dim, reinterpret_cast<Half*>(page) + at); break;
  }
}

// The keys and values of one KV head become row `row` of a sequence.
inline void append_row(const Pages& pages, int sequence, int head, int row, const float* key, const float* value) {
  const int in_page = row % pages.block_tokens;
  char* bytes = block_bytes(pages, sequence, row / pages.block_tokens);
  store_row(key, pages.k_dim, pages.k_type, bytes + head * pages.k_page_bytes, in_page);
  store_row(value, pages.v_dim, pages.v_type, bytes + pages.n_heads * pages.k_page_bytes + head * pages.v_page_bytes, in_page);
}

}  // namespace stratakv::STRATAKV_ISA
