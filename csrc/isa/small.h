// What <algorithm> has, once for each instruction set: the linker merges the standard library's own templates across
// files, and could give a plain processor code that was compiled for a newer one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "numbers.h"

// Small loops over registers: left rolled, the registers would become an array in memory.
#define STRATAKV_UNROLL _Pragma("GCC unroll 16")

namespace stratakv::STRATAKV_ISA {

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
constexpr T between(T x, T low, T high) {
  return smaller(larger(x, low), high);
}

// Rounded up to whole registers of every instruction set.
inline std::ptrdiff_t padded(std::ptrdiff_t n) { return (n + 15) / 16 * 16; }

inline float widened(BFloat x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void fill(float* to, std::ptrdiff_t n, float value) {
  for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = value;
}

inline void copy(const float* from, std::ptrdiff_t n, float* to) {
  for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace stratakv::STRATAKV_ISA
