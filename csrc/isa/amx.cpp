#define STRATAKV_ISA amx
#include "isa/vec_avx512.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && Tiles::are_permitted();
}

}  // namespace stratakv::STRATAKV_ISA
