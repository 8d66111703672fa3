// Whether memory was changed, from a little of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace stratakv {

// A number that differs, all but surely, where many of the bytes of stretches do: mixed from a few words of each, evenly spread.
inline std::uint64_t sample_of(const std::uint64_t* addresses, const std::uint64_t* sizes, std::ptrdiff_t n) {
  constexpr std::uint64_t kSpots = 8;
  std::uint64_t mixed = 0;
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    const char* const bytes = reinterpret_cast<const char*>(addresses[i]);
    const std::uint64_t width = std::min<std::uint64_t>(sizes[i], sizeof(std::uint64_t));
    if (width == 0) continue;
    for (std::uint64_t spot = 0; spot < kSpots; ++spot) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes + (sizes[i] - width) / (kSpots - 1) * spot, width);
      mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
      mixed ^= mixed >> 29;
    }
  }
  return mixed;
}

}  // namespace stratakv
