// New rows into pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention/arguments.h"
#include "attention/coding.inl"
#include "attention/formats.inl"
#include "attention/reading.inl"
#include "isa/partial.h"
#include "isa/small.h"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// The largest finite number of a format of 16 bits.
template <typename T>
constexpr float kLargest = std::is_same_v<T, Half> ? 65504.0f : 3.38953139e38f;

// Finite numbers beyond those of a format become its largest one; infinities and NaN stay.
template <typename T>
inline Vec saturated(Vec x) {
  const Vec least = Vec::all(-kLargest<T>), negated = Vec::all(-1.0f);
  const Vec at_least = Vec::max(least, x);  // max keeps NaN in its second operand, and of zeros that one's sign
  const Vec held = Vec::max(least, at_least * negated) * negated;
  return held - Vec::zero_where_less(x.size(), Vec::all(__builtin_inff()), x * negated);
}
template <>
inline Vec saturated<float>(Vec x) {
  return x;
}

// A row of numbers
template <typename T, typename From>
inline void store_row(const From* from, int dim, const T* row) {
  T* const to = const_cast<T*>(row);
  if constexpr (std::is_same_v<T, From>) {
    std::memcpy(to, from, dim * sizeof(T));
  } else {
    for (int d = 0; d < dim; d += Vec::kWidth) store_up_to(saturated<T>(load_up_to(from + d, dim - d)), to + d, dim - d);
  }
}

// or of codes, where a row's are its own.
template <typename F, typename From, typename Rows>
inline void store_codes(const From* from, const Rows& row) {
  if constexpr (F::kCoding != Coding::kChannels) {
    alignas(64) float numbers[kMostDim];
    for (int d = 0; d < row.dim; d += Vec::kWidth) load_up_to(from + d, row.dim - d).store(numbers + d);
    RowCoder<F>().code(numbers, row);
  }
}
template <typename F, typename From>
inline void store_row(const From* from, int, const PackedKeys<F>& row) {
  store_codes<F>(from, row);
}
template <typename F, typename From>
inline void store_row(const From* from, int, const PackedValues<F>& row) {
  store_codes<F>(from, row);
}

// The keys of a group of rows, from `row` of a sequence on; `keys` are the first one's.
template <typename From>
inline void append_group(const Pages& pages, int sequence, int head, int row, int n_rows, const From* keys, std::ptrdiff_t stride) {
  char* const page = block_bytes(pages, sequence, row / pages.block_tokens) + keys_at(pages, head);
  const auto load = [&](int i, int d, int n) { return load_up_to(keys + i * stride + d, n); };
  with_keys(pages.k_type, [&](auto format) {
    using F = decltype(format);
    if constexpr (IsPacked<F>) {
      if constexpr (F::kCoding == Coding::kChannels) GroupCoder<F>::code(load, n_rows, pages.k_dim, page, pages.block_tokens, row % pages.block_tokens);
    }
  });
}

// The keys and values of one KV head become row `row` of a sequence, but for keys that are coded with other rows.
template <typename From>
inline void append_row(const Pages& pages, int sequence, int head, int row, const From* key, const From* value) {
  const int in_page = row % pages.block_tokens;
  char* const block = block_bytes(pages, sequence, row / pages.block_tokens);
  if (pages.block_tokens == 1) append_group(pages, sequence, head, row, 1, key, 0);  // nothing to code it with
  with_keys(pages.k_type, [&](auto format) {
    store_row(key, pages.k_dim, key_rows_in<decltype(format)>(pages, block + keys_at(pages, head), in_page));
  });
  with_values(pages.v_type, [&](auto format) {
    store_row(value, pages.v_dim, value_rows_in<decltype(format)>(pages, block + values_at(pages, head), in_page));
  });
}

// A thread is worth its start for so many numbers.
constexpr std::int64_t kLeastNumbers = 1 << 14;

template <typename From>
inline void append_typed(const AppendArguments& a) {
  const Pages& pages = a.pages;
  const auto key = [&](int s, int h, int t) {
    return static_cast<const From*>(a.keys.data) + s * a.keys.sequence_stride + h * a.keys.head_stride + t * a.keys.token_stride;
  };
  const auto value = [&](int s, int h, int t) {
    return static_cast<const From*>(a.values.data) + s * a.values.sequence_stride + h * a.values.head_stride + t * a.values.token_stride;
  };
  // Groups of a page are numbered on over all pages.
  const int in_page = (pages.block_tokens + kGroupRows - 1) / kGroupRows;
  const auto group_of = [&](int row) { return row / pages.block_tokens * in_page + row % pages.block_tokens / kGroupRows; };
  const auto start_of = [&](int group) { return group / in_page * pages.block_tokens + group % in_page * kGroupRows; };
  const int first = a.in_groups ? group_of(a.row) : 0, end = a.in_groups ? group_of(a.row + a.n_tokens - 1) + 1 : a.n_tokens;
  const int n_units = end - first, n = a.n_sequences * n_units;
  const std::int64_t n_numbers = std::int64_t{a.n_sequences} * a.n_tokens * pages.n_heads * (pages.k_dim + pages.v_dim);
  const int n_threads = static_cast<int>(between<std::int64_t>(n_numbers / kLeastNumbers, 1, a.n_threads));
  in_parallel(n_threads, [&](int thread) {
    for (int i = static_cast<int>(std::int64_t{n} * thread / n_threads); i < std::int64_t{n} * (thread + 1) / n_threads; ++i) {
      const int sequence = i / n_units, unit = first + i % n_units;
      for (int head = 0; head < pages.n_heads; ++head) {
        if (a.in_groups) {
          const int start = start_of(unit), stop = smaller(start_of(unit + 1), a.row + a.n_tokens);
          append_group(pages, sequence, head, start, stop - start, key(sequence, head, start - a.row), a.keys.token_stride);
        } else {
          append_row(pages, sequence, head, a.row + unit, key(sequence, head, unit), value(sequence, head, unit));
        }
      }
    }
  });
}

inline void append(const AppendArguments& a) {
  switch (a.type) {
    case NumberType::kBFloat: return append_typed<BFloat>(a);
    case NumberType::kHalf: return append_typed<Half>(a);
    default: return append_typed<float>(a);
  }
}

}  // namespace stratakv::STRATAKV_ISA
