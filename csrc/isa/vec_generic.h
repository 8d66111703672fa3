// Eight floats as an array, for any processor: the compiler makes of it what it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

inline float widen(float x) { return x; }

inline float widen(BFloat x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float widen(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1F, mantissa = x.bits & 0x3FF;
  float out;
  if (exponent == 0) {  // zero or subnormal: the mantissa counts 2^-24
    out = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -out : out;
  }
  const std::uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, BFloat& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) {
    to.bits = 0x7FC0;
  } else {
    to.bits = static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

inline void narrow(float x, Half& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  const float size = std::fabs(x);
  if (x != x) {
    to.bits = static_cast<std::uint16_t>(sign | 0x7E00);
  } else if (size >= 65520.0f) {
    to.bits = static_cast<std::uint16_t>(sign | 0x7C00);
  } else if (size < 6.103515625e-5f) {  // subnormal: counted in 2^-24
    to.bits = static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(size * 16777216.0f)));
  } else {
    const std::uint32_t rounded = (bits & 0x7FFFFFFF) + 0xFFF + ((bits >> 13) & 1);
    to.bits = static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
  }
}

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 8;  // where a register has four floats and there are sixteen
  float v[kWidth];

  static Vec all(float x) { return map([=](int) { return x; }); }
  static Vec zero() { return all(0.0f); }
  template <typename T>
  static Vec load(const T* p) { return map([=](int i) { return widen(p[i]); }); }
  template <typename T>
  static Vec load_some(const T* p, int n) { return map([=](int i) { return i < n ? widen(p[i]) : 0.0f; }); }
  template <typename T>
  void store(T* p) const { store_some(p, kWidth); }
  template <typename T>
  void store_some(T* p, int n) const {
    for (int i = 0; i < n; ++i) narrow(v[i], p[i]);
  }

  static Vec fma(Vec a, Vec b, Vec c) { return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  // The numbers without their signs.
  Vec size() const { return map([&](int i) { return std::fabs(v[i]); }); }
  static Vec max(Vec a, Vec b) { return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  friend Vec operator+(Vec a, Vec b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
  friend Vec operator-(Vec a, Vec b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
  friend Vec operator*(Vec a, Vec b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
  friend Vec operator/(Vec a, Vec b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }

  float sum() const {
    float s = 0.0f;
    for (float x : v) s += x;
    return s;
  }
  float largest() const {
    float m = v[0];
    for (float x : v) m = x > m ? x : m;
    return m;
  }
  static void store_sums(Vec a, Vec b, Vec c, Vec d, float* p) {
    p[0] = a.sum();
    p[1] = b.sum();
    p[2] = c.sum();
    p[3] = d.sum();
  }

  // Rows become columns: kWidth of them.
  static void transpose(Vec* x) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = i + 1; j < kWidth; ++j) {
        const float moved = x[i].v[j];
        x[i].v[j] = x[j].v[i];
        x[j].v[i] = moved;
      }
    }
  }

  template <int... kPlaces>
  Vec shuffled() const {
    return {{v[kPlaces]...}};
  }

  // Whole numbers of at most 127.
  void store_bytes(std::int8_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<std::int8_t>(v[i] == v[i] ? v[i] : 0.0f);
  }

  // Whole numbers from 0 to 255.
  void store_counts(std::int8_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<std::int8_t>(static_cast<std::uint8_t>(v[i] == v[i] ? v[i] : 0.0f));
  }

  // Of four registers.
  template <bool kHasSign>
  static void store_four(const Vec (&x)[4], std::int8_t* p) {
    for (int i = 0; i < 4; ++i) kHasSign ? x[i].store_bytes(p + i * kWidth) : x[i].store_counts(p + i * kWidth);
  }

  static Vec zero_where_less(Vec a, Vec b, Vec value) { return map([&](int i) { return a.v[i] < b.v[i] ? 0.0f : value.v[i]; }); }
  static Vec round(Vec a) { return map([&](int i) { return std::nearbyint(a.v[i]); }); }
  static Vec power_of_two(Vec n) {
    return map([&](int i) {
      const std::uint32_t bits = n.v[i] == n.v[i] ? static_cast<std::uint32_t>(static_cast<std::int32_t>(n.v[i]) + 127) << 23 : 0x7FC00000u;
      float out;
      std::memcpy(&out, &bits, sizeof out);
      return out;
    });
  }

 private:
  template <typename Function>
  static Vec map(const Function& function) {
    Vec out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = function(i);
    return out;
  }
};

// Eight 32-bit integers, or 32 bytes.
struct Ints {
  std::int32_t v[Vec::kWidth];

  static Ints zero() { return all(0); }
  static Ints all(std::int32_t x) {
    Ints out;
    for (std::int32_t& each : out.v) each = x;
    return out;
  }
  static Ints load(const void* p) {
    Ints out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static Ints load_some(const void* p, int n) {
    Ints out = zero();
    std::memcpy(out.v, p, 4 * static_cast<std::size_t>(n));
    return out;
  }

  // Of each byte, kBits bits from kFrom on.
  template <int kFrom, int kBits>
  Ints field() const {
    Ints out;
    constexpr std::uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
    for (int i = 0; i < Vec::kWidth; ++i) {
      out.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(v[i]) >> kFrom & kMask);
    }
    return out;
  }

  // Of each number, n bits from `from` on.
  Ints bits(int from, int n) const {
    Ints out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(v[i]) >> from & ((1u << n) - 1));
    return out;
  }

  // sum[i] + the products of the four unsigned bytes of a[i] with the signed ones of b[i], of which no two together exceed 16 bits.
  static Ints dot(Ints sum, Ints a, Ints b) {
    for (int i = 0; i < Vec::kWidth; ++i) {
      std::uint8_t x[4];
      std::int8_t y[4];
      std::memcpy(x, &a.v[i], 4);
      std::memcpy(y, &b.v[i], 4);
      for (int j = 0; j < 4; ++j) sum.v[i] += x[j] * y[j];
    }
    return sum;
  }
  // 128 a + b.
  static Ints joined(Ints a, Ints b) {
    for (int i = 0; i < Vec::kWidth; ++i) b.v[i] += 128 * a.v[i];
    return b;
  }
  Vec floats() const {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = static_cast<float>(v[i]);
    return out;
  }

  // The numbers in e4m3 that stand in one byte of each four.
  template <int kByte>
  Vec e4m3() const {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) {
      const std::uint32_t x = static_cast<std::uint32_t>(v[i]) >> (8 * kByte);
      const std::uint32_t size = x & 0x7F, bits = (size << 20) + (120u << 23);
      std::memcpy(&out.v[i], &bits, sizeof bits);
      if (size < 8) out.v[i] = static_cast<float>(size) * 0x1p-9f;  // without an exponent
      if (x & 0x80) out.v[i] = -out.v[i];
    }
    return out;
  }
};

}  // namespace stratakv::STRATAKV_ISA
