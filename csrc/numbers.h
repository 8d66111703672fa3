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

enum class NumberType : std::int32_t { kFloat = 0, kBFloat = 1, kHalf = 2 };

}  // namespace stratakv
