// The number formats of pages, queries and outputs.
#pragma once

#include <cstdint>

namespace stratakv {

struct Half {
  std::uint16_t bits;
};

struct BFloat {
  std::uint16_t bits;
};

enum class NumberType : std::int32_t { kFloat = 0, kBFloat = 1, kHalf = 2, kFloat8 = 3, kInt8 = 4, kInt4 = 5, kInt2 = 6 };

// Whether pages hold numbers of the type as they are, row after row.
inline bool is_plain(NumberType type) { return type <= NumberType::kHalf; }

}  // namespace stratakv
