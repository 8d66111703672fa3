// Tile registers of AMX: eight, of 16 rows of 64 bytes each, and products of bf16 tiles with sums in fp32.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "isa/small.h"
#include "numbers.h"
#include "tiled/parts.h"

namespace stratakv::STRATAKV_ISA {

struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t n_rows[16];
};

// While it lives, the thread has its tiles.
class Tiles {
 public:
  static constexpr bool kSplitsPay = true;
  static constexpr int kInputs = kTiledPair;

  Tiles() { have_rows(kTiledPair); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

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

  template <int kRowParts, int kPanelParts>
  void multiply(const Factors& f, const TiledSums& sums, bool adds) {
    n_ > kTile ? multiply<kRowParts, kPanelParts, true>(f, sums, adds) : multiply<kRowParts, kPanelParts, false>(f, sums, adds);
  }

  // Linux gives a process the tiles' registers on demand.
  static bool are_permitted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return permitted;
  }

 private:
  // These are what the intrinsics are, but that the compiler knows of memory that is read (GCC 12 does not, and moves stores
  // behind it), and that numbers of tiles may come from templates. Strides are bytes from one row to the next.
  template <int kNumber>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kNumber));
  }

  template <int kNumber>
  void load(const void* rows, std::ptrdiff_t stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kNumber) : "memory");
  }

  template <int kNumber>
  void store(void* rows, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kNumber) : "memory");
  }

  template <int kSums, int kRows, int kColumns>
  void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
  }

  template <int kNumber>
  void begin(const float* sums, std::ptrdiff_t stride, bool adds) {
    adds ? load<kNumber>(sums, stride) : zero<kNumber>();
  }

  // The tiles 0 and 1 are sums of the first 16 rows with either panel, 2 and 3 those of the other rows.
  template <int kRowParts, int kPanelParts, bool kTwo>
  void multiply(const Factors& f, const TiledSums& sums, bool adds) {
    const std::ptrdiff_t width = sums.pitch * static_cast<std::ptrdiff_t>(sizeof(float));
    float *const lower_a = sums.a + kTile * sums.pitch, *const lower_b = sums.b + kTile * sums.pitch;
    begin<0>(sums.a, width, adds);
    begin<1>(sums.b, width, adds);
    if constexpr (kTwo) {
      begin<2>(lower_a, width, adds);
      begin<3>(lower_b, width, adds);
    }
    const std::ptrdiff_t stride = f.row_pitch * static_cast<std::ptrdiff_t>(sizeof(BFloat));
    const BFloat *upper = f.rows, *lower = f.rows + kTile * f.row_pitch, *a = f.a, *b = f.b;
    const char* ahead = f.ahead.from;
    for (std::ptrdiff_t k = 0; k < f.n_steps; ++k) {
      for (int line = 0; line < f.ahead.lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      STRATAKV_UNROLL
      for (int of_row = 0; of_row < kRowParts; ++of_row) {
        STRATAKV_UNROLL
        for (int of_panel = 0; of_panel < kPanelParts; ++of_panel) {
          if (of_row == 0 || kPanelParts > 1) {
            load<6>(a + of_panel * kTileNumbers);
            load<7>(b + of_panel * kTileNumbers);
          }
          if (of_panel == 0) load<4>(upper + of_row * kDeep, stride);
          add_product<0, 4, 6>();
          add_product<1, 4, 7>();
          if constexpr (kTwo) {
            if (of_panel == 0) load<5>(lower + of_row * kDeep, stride);
            add_product<2, 5, 6>();
            add_product<3, 5, 7>();
          }
        }
      }
      upper += kRowParts * kDeep;
      lower += kRowParts * kDeep;
      a += f.panel_pitch;
      b += f.panel_pitch;
    }
    if constexpr (kTwo) {
      store<2>(lower_a, width);
      store<3>(lower_b, width);
    }
    store<0>(sums.a, width);
    store<1>(sums.b, width);
  }

  int n_ = 0;
};

}  // namespace stratakv::STRATAKV_ISA
