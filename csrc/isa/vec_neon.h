// Four floats in a NEON register, which every 64-bit ARM processor has.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kRegisters = 32;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec all(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const Half* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
  static Vec load(const BFloat* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))}; }
  template <typename T>
  static Vec load_some(const T* p, int n) {  // the rest are zeros
    T padded[kWidth] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(Half* p) const { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  void store(BFloat* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7FC0))));
  }
  template <typename T>
  void store_some(T* p, int n) const {
    T padded[kWidth];
    store(padded);
    std::memcpy(p, padded, n * sizeof(T));
  }

  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  // The numbers without their signs.
  Vec size() const { return {vabsq_f32(v)}; }
  // The second where either is no number, as elsewhere; vmaxq_f32 would give none.
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }

  float sum() const { return vaddvq_f32(v); }
  float largest() const { return vmaxnmvq_f32(v); }
  static void store_sums(Vec a, Vec b, Vec c, Vec d, float* p) {
    vst1q_f32(p, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
  }

  // Rows become columns: kWidth of them.
  static void transpose(Vec* x) {
    const float32x4x2_t upper = vtrnq_f32(x[0].v, x[1].v), lower = vtrnq_f32(x[2].v, x[3].v);
    x[0].v = vcombine_f32(vget_low_f32(upper.val[0]), vget_low_f32(lower.val[0]));
    x[1].v = vcombine_f32(vget_low_f32(upper.val[1]), vget_low_f32(lower.val[1]));
    x[2].v = vcombine_f32(vget_high_f32(upper.val[0]), vget_high_f32(lower.val[0]));
    x[3].v = vcombine_f32(vget_high_f32(upper.val[1]), vget_high_f32(lower.val[1]));
  }

  // The numbers of these places.
  template <int... kPlaces>
  Vec shuffled() const {
    return {__builtin_shufflevector(v, v, kPlaces...)};
  }

  // Whole numbers of at most 127.
  void store_bytes(std::int8_t* p) const {
    const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    std::memcpy(p, &bytes, kWidth);
  }

  // Whole numbers from 0 to 255.
  void store_counts(std::int8_t* p) const { store_bytes(p); }

  // Of four registers.
  template <bool kHasSign>
  static void store_four(const Vec (&x)[4], std::int8_t* p) {
    for (int i = 0; i < 4; ++i) kHasSign ? x[i].store_bytes(p + i * kWidth) : x[i].store_counts(p + i * kWidth);
  }

  static Vec zero_where_less(Vec a, Vec b, Vec value) {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.v), vcltq_f32(a.v, b.v)))};
  }
  static Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  // 2^n for whole n in [-126, 127].
  static Vec power_of_two(Vec n) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
  }
};

// Four 32-bit integers, or 16 bytes.
struct Ints {
  int32x4_t v;

  static Ints zero() { return all(0); }
  static Ints all(std::int32_t x) { return {vdupq_n_s32(x)}; }
  static Ints load(const void* p) { return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p)))}; }
  static Ints load_some(const void* p, int n) {
    std::int32_t words[Vec::kWidth] = {};
    std::memcpy(words, p, 4 * static_cast<std::size_t>(n));
    return load(words);
  }

  // Of each byte, kBits bits from kFrom on.
  template <int kFrom, int kBits>
  Ints field() const {
    if constexpr (kBits == 8) return *this;
    uint8x16_t bytes = vreinterpretq_u8_s32(v);
    if constexpr (kFrom > 0) bytes = vshrq_n_u8(bytes, kFrom > 0 ? kFrom : 1);
    return {vreinterpretq_s32_u8(vandq_u8(bytes, vdupq_n_u8((1 << kBits) - 1)))};
  }

  // Of each number, n bits from `from` on.
  Ints bits(int from, int n) const {
    const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-from));
    return {vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32((1u << n) - 1)))};
  }

  // sum[i] + the products of the four unsigned bytes of a[i] with the signed ones of b[i], of which no two together exceed 16 bits.
  static Ints dot(Ints sum, Ints a, Ints b) {
    const uint8x16_t u = vreinterpretq_u8_s32(a.v);
    const int8x16_t s = vreinterpretq_s8_s32(b.v);
    const int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), vmovl_s8(vget_low_s8(s)));
    const int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u))), vmovl_s8(vget_high_s8(s)));
    return {vaddq_s32(sum.v, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))};
  }
  // 128 a + b.
  static Ints joined(Ints a, Ints b) { return {vaddq_s32(vshlq_n_s32(a.v, 7), b.v)}; }
  Vec floats() const { return {vcvtq_f32_s32(v)}; }

  // The numbers in e4m3 that stand in one byte of each four.
  template <int kByte>
  Vec e4m3() const {
    const uint32x4_t whole = vreinterpretq_u32_s32(v);
    uint32x4_t x = whole;
    if constexpr (kByte > 0) x = vshrq_n_u32(whole, kByte > 0 ? 8 * kByte : 1);
    const uint32x4_t size = vandq_u32(x, vdupq_n_u32(0x7F)), sign = vandq_u32(vshlq_n_u32(x, 24), vdupq_n_u32(0x80000000u));
    const uint32x4_t normal = vaddq_u32(vshlq_n_u32(size, 20), vdupq_n_u32(120u << 23));
    const float32x4_t small = vmulq_f32(vcvtq_f32_u32(size), vdupq_n_f32(0x1p-9f));  // without an exponent
    const uint32x4_t found = vbslq_u32(vcltq_u32(size, vdupq_n_u32(8)), vreinterpretq_u32_f32(small), normal);
    return {vreinterpretq_f32_u32(vorrq_u32(found, sign))};
  }
};

}  // namespace stratakv::STRATAKV_ISA
