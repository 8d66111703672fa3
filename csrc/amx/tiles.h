// Tile registers of AMX: eight, of 16 rows of 64 bytes each, and products of bf16 tiles with sums in fp32.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "isa/small.h"
#include "numbers.h"

namespace stratakv::STRATAKV_ISA {

constexpr int kTile = 16;            // rows of a tile, and fp32 numbers of a row
constexpr int kDeep = 32;            // bf16 numbers of a row
constexpr int kTileNumbers = kTile * kDeep;  // bf16 numbers of a tile
constexpr int kTileSums = kTile * kTile;
constexpr int kTiledPair = 2 * kTile;  // two tiles side by side, or one below the other

inline std::ptrdiff_t whole_steps(std::ptrdiff_t n) { return (n + kDeep - 1) / kDeep; }

struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t n_rows[16];
};

// While it lives, the thread has its tiles, all of them whole at first.
class Tiles {
 public:
  Tiles() { have_rows(2 * kTile); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Of `n` rows, at most 32, the first 16 are those of the tiles 0, 1 and 4, the others those of 2, 3 and 5.
  void have_rows(int n) {
    if (n == n_) return;
    n_ = n;
    const int upper = smaller(n, kTile), lower = n > kTile ? n - kTile : kTile;
    alignas(64) TileConfig config{1, 0, {}, {}, {}};
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kTile, kTile};
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.n_rows[i] = static_cast<std::uint8_t>(rows[i]);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));  // all of it, of which GCC 12's own knows the first 8 bytes only
  }

  // Linux gives a process the tiles' registers on demand.
  static bool are_permitted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return permitted;
  }

 private:
  int n_ = 0;
};

// What the intrinsics are, but that the compiler knows of memory that is read (GCC 12 does not, and moves stores behind
// it), and that numbers of tiles may come from templates. Strides are bytes from one row to the next.

template <int kNumber>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kNumber));
}

template <int kNumber>
inline void load_tile(const void* rows, std::ptrdiff_t stride = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kNumber) : "memory");
}

template <int kNumber>
inline void store_tile(void* rows, std::ptrdiff_t stride = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kNumber) : "memory");
}

// Adds the product of the tiles `kRows`, by rows, and `kColumns`, packed.
template <int kSums, int kRows, int kColumns>
inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
}

// An fp32 number as the sum of two bf16 numbers, which hold 16 of its 24 bits: what multiplies a bf16 number by both
// is nearly as good as fp32.
constexpr int kParts = 2;

struct Split {
  __m512i high, low;  // [32] bf16
};

inline __m512 widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// What is left of x, none where it is infinite or rounds to that.
inline __m512 remainder_of(__m512 x, __m256i high) {
  const __m512 rounded = widened(high);
  const __mmask16 is_finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rounded), _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
  return _mm512_maskz_sub_ps(is_finite, x, rounded);
}

inline Split split(__m512 first, __m512 second) {
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512 a = remainder_of(first, _mm512_castsi512_si256(high)), b = remainder_of(second, _mm512_extracti64x4_epi64(high, 1));
  return {high, (__m512i)_mm512_cvtne2ps_pbh(b, a)};
}

}  // namespace stratakv::STRATAKV_ISA
