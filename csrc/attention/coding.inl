// Rows of numbers become codes: bit for bit those that the codecs' Python code gives, which says what they mean.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/packed.inl"
#include "attention/rotation.inl"
#include "isa/partial.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

constexpr float kNoNumber = __builtin_nanf("");

inline float power_of_two(int n) {
  const std::uint32_t bits = static_cast<std::uint32_t>(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Factors that bring numbers, of which the largest is `most` in size, to at most 1, and parameters back.
struct Powers {
  float down, up;

  explicit Powers(float most) {
    std::uint32_t bits;
    std::memcpy(&bits, &most, sizeof bits);
    const int exponent = between(static_cast<int>(bits >> 23 & 255) - 126, -120, 120);
    down = power_of_two(-exponent);
    up = power_of_two(exponent);
  }

  // A parameter as it is stored. What is too large for it saturates, what is no number is NaN.
  BFloat stored(float parameter) const {
    constexpr float kMost = 3.38953139e38f;
    if (!(std::fabs(parameter) <= 3.40282347e38f)) return {0x7FC0};
    const float x = between(parameter * up, -kMost, kMost) + 0.0f;  // no negative zero
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }

  // And as it is read again.
  float read(float parameter) const { return widened(stored(parameter)) * down; }
};

// The largest number of a row and its largest negated, from which partial registers take no zeros.
inline float largest_of(const float* row, int n, float sign) {
  if (n < Vec::kWidth) {
    float most = sign * row[0];
    for (int i = 1; i < n; ++i) most = larger(most, sign * row[i]);
    return most;
  }
  const Vec factor = Vec::all(sign);
  Vec most = Vec::load(row + n - Vec::kWidth) * factor;
  for (int i = 0; i + Vec::kWidth <= n; i += Vec::kWidth) most = Vec::max(Vec::load(row + i) * factor, most);
  return most.largest();
}

// The sum of `n` numbers, in the order in which the codecs' Python code takes it; they are lost.
inline float sum_by_halves(float* numbers, int n) {
  while (n > 1) {
    const int half = (n + 1) / 2;
    for (int i = 0; i < n - half; ++i) numbers[i] += numbers[half + i];
    n = half;
  }
  return numbers[0];
}

// The nearest of `kMost` + 1 levels from `lowest` on; what is no number becomes 0.
template <int kMost>
inline Vec nearest(Vec x, Vec lowest, Vec step) {
  const Vec zero = Vec::zero(), most = Vec::all(static_cast<float>(kMost));
  const Vec code = Vec::max(Vec::round((x - lowest) / step), zero);
  return zero - Vec::max(zero - code, zero - most);
}

// The code of a number, at most 448.
inline std::uint8_t e4m3(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 24 & 0x80;
  const float size = smaller(std::fabs(x), 448.0f);
  std::memcpy(&bits, &size, sizeof bits);
  if (size < 0x1p-6f) return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(std::nearbyint(size * 512.0f)));
  return static_cast<std::uint8_t>(sign | (bits + 0x7FFFF + (bits >> 20 & 1) - (120u << 23)) >> 20);
}

// Four bytes for as many fours of codes as they hold.
template <typename F>
inline void put_four(const std::uint8_t* codes, unsigned char* to) {
  std::uint32_t word = 0;
  STRATAKV_UNROLL
  for (int i = 0; i < F::kFields; ++i) {
    std::uint32_t four;
    std::memcpy(&four, codes + 4 * i, sizeof four);
    word |= four << F::kBits * i;
  }
  std::memcpy(to, &word, sizeof word);
}

// The first four of a row of keys.
template <typename F>
inline unsigned char* fours_of(const PackedKeys<F>& rows, int row) {
  unsigned char* const codes = reinterpret_cast<unsigned char*>(const_cast<char*>(rows.codes));
  return codes + row / kLanes * PackedKeys<F>::tile_bytes(rows.dim) + row % kLanes * 4;
}

// Codes of one row, a byte each, and its parameters, kLanes apart.
template <IsPacked F>
class RowCoder {
 public:
  // A row of fp32 numbers with zeros up to padded(dim), which is lost, becomes the first one of `to`.
  void code(float* row, const PackedKeys<F>& to) {
    code(row, to.dim, parameters_of(to));
    unsigned char* const fours = fours_of(to, to.row);
    for (int i = 0; i < PackedKeys<F>::quads(to.dim); ++i) put_four<F>(codes_ + i * F::kFields * 4, fours + std::ptrdiff_t{i} * kLanes * 4);
  }

  void code(float* row, const PackedValues<F>& to) {
    code(row, to.dim, parameters_of(to));
    const int n_words = PackedValues<F>::words(to.dim);
    char* const first = const_cast<char*>(to.codes) + std::ptrdiff_t{to.row / 4} * n_words * 4 + to.row % 4;
    for (int g = 0; g * kGroup < to.dim; ++g) {
      const int own = PackedValues<F>::words_of(to.dim, g);
      const std::uint8_t* const codes = codes_ + g * kGroup;
      char* const bytes = first + PackedValues<F>::word_at(g) * 4;
      for (int word = 0; word < own; ++word) {
        unsigned byte = codes[word];
        for (int i = 1; i < F::kFields; ++i) byte |= static_cast<unsigned>(codes[i * own + word]) << F::kBits * i;
        bytes[word * 4] = static_cast<char>(byte);
      }
    }
  }

 private:
  static BFloat* parameters_of(const PackedRows<F>& to) {
    const std::ptrdiff_t tile = to.row / kLanes * PackedRows<F>::n_parameters(to.dim);
    return const_cast<BFloat*>(to.parameters) + tile * kLanes + to.row % kLanes;
  }

  void code(float* row, int dim, BFloat* parameters) {
    std::memset(codes_, 0, sizeof codes_);
    Vec largest = Vec::zero(), total = Vec::zero();
    for (int d = 0; d < dim; d += Vec::kWidth) {
      const Vec x = Vec::load(row + d);
      largest = Vec::max(x.size(), largest);
      total = total + x * Vec::zero();
    }
    if (total.sum() != 0.0f) {
      for (int i = 0; i < PackedRows<F>::n_parameters(dim); ++i) parameters[i * kLanes].bits = 0x7FC0;
      return;
    }
    const Powers powers(largest.largest());
    for (int d = 0; d < dim; d += Vec::kWidth) (Vec::load(row + d) * Vec::all(powers.down)).store(row + d);
    if constexpr (F::kRotates) rotate(row, dim);
    if constexpr (F::kAffine) {
      const int n_groups = PackedRows<F>::groups(dim);
      for (int g = 0; g < n_groups; ++g) code_group(powers, row, dim, g, parameters + g * kLanes, parameters + (n_groups + g) * kLanes);
    } else {
      code_sizes(powers, row, dim, parameters);
    }
  }

  // Numbers over a scale.
  void code_sizes(const Powers& powers, const float* row, int dim, BFloat* parameter) {
    constexpr float kMost = F::kCoding == Coding::kFloating ? 448.0f : 127.0f;
    const float most = larger(largest_of(row, dim, 1.0f), largest_of(row, dim, -1.0f)) / kMost, scale = powers.read(most);
    *parameter = powers.stored(scale);
    const Vec zero = Vec::zero(), limit = Vec::all(kMost);
    for (int d = 0; d < dim; d += Vec::kWidth) {
      const Vec x = scale > 0.0f ? Vec::load(row + d) / Vec::all(scale) : zero;
      if constexpr (F::kCoding == Coding::kCentred) {
        const Vec at_most = zero - Vec::max(zero - Vec::round(x), zero - limit);
        Vec::max(at_most, zero - limit).store_bytes(reinterpret_cast<std::int8_t*>(codes_) + d);
      } else {
        float numbers[Vec::kWidth];
        x.store(numbers);
        for (int i = 0; i < Vec::kWidth; ++i) codes_[d + i] = e4m3(numbers[i]);
      }
    }
    for (int d = 0; d < dim && F::kCoding == Coding::kCentred; ++d) codes_[d] ^= 0x80;
    std::memset(codes_ + dim, 0, padded(dim) - dim);
  }

  // Levels at equal distances.
  void code_group(const Powers& powers, const float* row, int dim, int g, BFloat* step_at, BFloat* lowest_at) {
    constexpr int kMost = (1 << F::kBits) - 1;
    const int from = g * kGroup, n = smaller(kGroup, dim - from);
    const float* const numbers = row + from;
    const float largest = largest_of(numbers, n, 1.0f), least = -largest_of(numbers, n, -1.0f);
    float least_error = 0.0f;
    for (int i = 0; i < F::kSpreads; ++i) {
      const float span = (largest - least) * kSpread[i], step = powers.read(span / kMost), lowest = powers.read((least + largest - span) / 2.0f);
      alignas(64) float codes[kGroup], errors[kGroup];
      for (int d = 0; d < n; d += Vec::kWidth) {
        const Vec x = Vec::load(numbers + d), code = step > 0.0f ? nearest<kMost>(x, Vec::all(lowest), Vec::all(step)) : Vec::zero();
        const Vec error = Vec::all(lowest) + Vec::all(step) * code - x;
        code.store(codes + d);
        (error * error).store(errors + d);
      }
      if constexpr (F::kSpreads > 1) {
        const float error = sum_by_halves(errors, n);
        if (i > 0 && !(error < least_error)) continue;
        least_error = error;
      }
      *step_at = powers.stored(step);
      *lowest_at = powers.stored(lowest);
      for (int d = 0; d < n; d += Vec::kWidth) Vec::load(codes + d).store_bytes(reinterpret_cast<std::int8_t*>(codes_) + from + d);
      std::memset(codes_ + from + n, 0, padded(n) - n);
    }
  }

  alignas(64) std::uint8_t codes_[kMostDim + 16];
};

// The codes of a group of rows, whose channels have parameters of their own.
template <IsPacked F>
class GroupCoder {
 public:
  // `load(row, d, n)` gives the numbers of channels [d, d + n) of a row as a register. The first row is a page's `row`.
  template <typename Load>
  static void code(const Load& load, int n_rows, int dim, char* page, int block_tokens, int row) {
    const PackedKeys<F> rows(page, dim, block_tokens, row);
    BFloat* const parameters = const_cast<BFloat*>(rows.parameters) + std::ptrdiff_t{row / kGroupRows} * 2 * dim;
    for (int from = 0; from < dim; from += kChannels) {
      GroupCoder coder;
      coder.read(load, n_rows, from, smaller(kChannels, dim - from));
      coder.choose(parameters + from, parameters + dim + from);
      for (int i = 0; i < n_rows; ++i) coder.put(i, fours_of(rows, row + i) + std::ptrdiff_t{from / (4 * F::kFields)} * kLanes * 4);
    }
  }

 private:
  static constexpr int kChannels = 64;

  template <typename Load>
  void read(const Load& load, int n_rows, int from, int n) {
    n_ = n;
    for (int d = 0; d < n; d += Vec::kWidth) {
      Vec largest{}, least{}, total = Vec::zero();
      for (int i = 0; i < n_rows; ++i) {
        const Vec x = load(i, from + d, n - d);
        largest = i == 0 ? x : Vec::max(x, largest);
        least = i == 0 ? Vec::zero() - x : Vec::max(Vec::zero() - x, least);  // negated
        total = total + x * Vec::zero();
        x.store(numbers_[i] + d);
      }
      largest.store(largest_ + d);
      least.store(least_ + d);
      total.store(total_ + d);
    }
  }

  void choose(BFloat* steps, BFloat* lowests) {
    constexpr int kMost = (1 << F::kBits) - 1;
    for (int d = 0; d < n_; ++d) {
      if (total_[d] != 0.0f) {
        steps[d].bits = lowests[d].bits = 0x7FC0;
        down_[d] = lowest_[d] = 0.0f;  // all codes are 0
        step_[d] = 1.0f;
        continue;
      }
      const float largest = largest_[d], least = -least_[d];
      const Powers powers(larger(std::fabs(largest), std::fabs(least)));
      const float lowest = least * powers.down, step = (largest * powers.down - lowest) / kMost;
      lowests[d] = powers.stored(powers.read(lowest));
      steps[d] = powers.stored(powers.read(step));
      down_[d] = powers.down;
      lowest_[d] = powers.read(lowest);
      step_[d] = powers.read(step);
      if (!(step_[d] > 0.0f)) {
        down_[d] = lowest_[d] = 0.0f;
        step_[d] = 1.0f;
      }
    }
    for (int d = n_; d < padded(n_); ++d) {
      down_[d] = lowest_[d] = 0.0f;
      step_[d] = 1.0f;
    }
  }

  void put(int row, unsigned char* lane) const {
    constexpr int kMost = (1 << F::kBits) - 1;
    alignas(64) std::uint8_t codes[kChannels] = {};
    for (int d = 0; d < n_; d += Vec::kWidth) {
      const Vec x = Vec::load(numbers_[row] + d) * Vec::load(down_ + d);
      nearest<kMost>(x, Vec::load(lowest_ + d), Vec::load(step_ + d)).store_bytes(reinterpret_cast<std::int8_t*>(codes) + d);
    }
    for (int at = 0; at < n_; at += 4 * F::kFields) put_four<F>(codes + at, lane + at / F::kFields * kLanes);
  }

  int n_;
  alignas(64) float numbers_[kGroupRows][kChannels];
  alignas(64) float largest_[kChannels], least_[kChannels], total_[kChannels], down_[kChannels], lowest_[kChannels], step_[kChannels];
};

}  // namespace stratakv::STRATAKV_ISA
