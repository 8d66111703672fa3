// Where a call's numbers lie: the pages of a block, and the queries.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/arguments.h"
#include "attention/sight.inl"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

// The bytes of one of a sequence's blocks.
inline char* block_bytes(const Pages& pages, int sequence, int block) {
  const std::int32_t* place = pages.table + sequence * pages.table_stride + 2 * std::ptrdiff_t{block};
  return reinterpret_cast<char*>(pages.slabs[place[0]]) + place[1] * pages.block_bytes;
}

// Where one KV head's keys and values begin in a block.
inline std::ptrdiff_t keys_at(const Pages& pages, int head) { return head * pages.k_page_bytes; }
inline std::ptrdiff_t values_at(const Pages& pages, int head) { return pages.n_heads * pages.k_page_bytes + head * pages.v_page_bytes; }

template <typename K>
inline const K* keys_in(const Pages& pages, const char* block, int head) {
  return reinterpret_cast<const K*>(block + keys_at(pages, head));
}

template <typename V>
inline const V* values_in(const Pages& pages, const char* block, int head) {
  return reinterpret_cast<const V*>(block + values_at(pages, head));
}

template <typename Q>
inline void load_query(const Q* from, int dim, float scale, float* to) {
  for (int d = 0; d < dim; d += Vec::kWidth) {
    (load_up_to(from + d, dim - d) * Vec::all(scale)).store(to + d);
  }
}

// The query times `scale`, with zeros up to padded(k_dim).
inline void load_query(const AttentionArguments& a, int sequence, Query query, float scale, float* to) {
  const int dim = a.pages.k_dim;
  const std::ptrdiff_t at = sequence * a.query.sequence_stride + query.head * a.query.head_stride + query.token * a.query.token_stride;
  fill(to, padded(dim), 0.0f);
  switch (a.query_type) {
    case NumberType::kBFloat: load_query(static_cast<const BFloat*>(a.query.data) + at, dim, scale, to); break;
    case NumberType::kHalf: load_query(static_cast<const Half*>(a.query.data) + at, dim, scale, to); break;
    default: load_query(static_cast<const float*>(a.query.data) + at, dim, scale, to); break;
  }
}

}  // namespace stratakv::STRATAKV_ISA
